"""Binds handler objects to the services of the contract.

A handler object has coroutine methods named as the rpcs in snake case:

* unary: `async def get_run(self, request, call) -> GetRunResponse`
* server stream: `def watch_rollouts(self, request, call) -> AsyncIterator[WatchRolloutsResponse]`
* client stream: `async def put_blob(self, stream: RequestStream, call) -> PutBlobResponse`
* bidirectional: `async def stream_spans(self, stream: BidiStream, call) -> None`

Answers may be messages or bytes that are a serialised answer. Whole services are registered as one generic
handler that receives raw bytes: generated registration would win over single raw handlers, and a request
that does not parse must answer INVALID_ARGUMENT instead of a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from agl_grpc.store import errors
from agl_grpc.store.door.call import Authenticator, Call
from agl_grpc.store.door.fields import check_request

log = logging.getLogger(__name__)

Answer = Message | bytes
Parser = Callable[[bytes], Any]
Context = Any  # grpc.aio.ServicerContext: its stubs lack the generic parameters' variance we need
RequestT = TypeVar("RequestT")

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class RequestStream(Generic[RequestT]):
    """What a caller says in a call with many requests."""

    def __init__(self, context: Context, parse: Parser) -> None:
        self._context = context
        self._parse = parse

    async def read(self) -> RequestT | None:
        """The caller's next message; None when it has said all.

        Raises:
            StoreError: the message does not parse.
        """
        raw = await self._context.read()
        if raw is grpc.aio.EOF:
            return None
        request: RequestT = _parse(self._parse, raw)
        return request


class BidiStream(RequestStream[RequestT]):
    """Both directions of one bidirectional call; reading and writing may run at the same time."""

    def __init__(self, context: Context, parse: Parser) -> None:
        super().__init__(context, parse)
        self._writing = asyncio.Lock()

    async def write(self, answer: Answer) -> None:
        """Send a message to the caller; waits while it reads slowly."""
        # gRPC allows one write at a time, the handler's tasks may have several to say.
        async with self._writing:
            await self._context.write(_serialise(answer))


def snake_case(name: str) -> str:
    """`StreamSpans` → `stream_spans`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class ServiceBinder:
    """Makes generic gRPC handlers out of handler objects.

    Args:
        authenticator: says who calls.
        drain: set when the server goes away.
        parsers: views that replace the generated request type, by method name or full name.
    """

    def __init__(
        self, authenticator: Authenticator, drain: asyncio.Event, parsers: Mapping[str, Parser]
    ) -> None:
        self._authenticator = authenticator
        self._drain = drain
        self._parsers = parsers

    def bind(self, service: ServiceDescriptor, handlers: Sequence[object]) -> grpc.GenericRpcHandler:
        """The generic handler of one service; methods that no object has answer UNIMPLEMENTED."""
        methods = {method.name: self._method(method, handlers) for method in service.methods}
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _method(
        self, method: MethodDescriptor, handlers: Sequence[object]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        request_type = message_factory.GetMessageClass(method.input_type)
        parse = parser_of(method, self._parsers) or _checked(request_type.FromString)
        target = _find(handlers, snake_case(method.name))
        if method.client_streaming and method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._bidi(method.name, target, parse))
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._collect(method.name, target, parse))
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method.name, target, parse))
        return grpc.unary_unary_rpc_method_handler(self._unary(method.name, target, parse))

    def _call(self, name: str, context: Context) -> Call:
        caller = self._authenticator.caller(name, context.invocation_metadata() or ())
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        return Call(caller, name, deadline, self._drain)

    def _unary(self, name: str, target: Any, parse: Parser) -> Callable[..., Awaitable[bytes]]:
        async def unary(raw: bytes, context: Context) -> bytes:
            try:
                call = self._call(name, context)
                if target is None:
                    raise errors.method_unimplemented(name)
                return _serialise(await target(_parse(parse, raw), call))
            except Exception as error:
                await _abort(name, context, error)

        return unary

    def _stream(self, name: str, target: Any, parse: Parser) -> Callable[..., AsyncIterator[bytes]]:
        async def stream(raw: bytes, context: Context) -> AsyncIterator[bytes]:
            try:
                call = self._call(name, context)
                if target is None:
                    raise errors.method_unimplemented(name)
                answers = target(_parse(parse, raw), call)
                try:
                    async for answer in answers:
                        yield _serialise(answer)
                finally:
                    await answers.aclose()
            except Exception as error:
                await _abort(name, context, error)

        return stream

    def _bidi(self, name: str, target: Any, parse: Parser) -> Callable[..., Awaitable[None]]:
        async def bidi(_requests: object, context: Context) -> None:
            try:
                call = self._call(name, context)
                if target is None:
                    raise errors.method_unimplemented(name)
                await target(BidiStream(context, parse), call)
            except Exception as error:
                await _abort(name, context, error)

        return bidi

    def _collect(self, name: str, target: Any, parse: Parser) -> Callable[..., Awaitable[bytes]]:
        async def collect(_requests: object, context: Context) -> bytes:
            try:
                call = self._call(name, context)
                if target is None:
                    raise errors.method_unimplemented(name)
                return _serialise(await target(RequestStream(context, parse), call))
            except Exception as error:
                await _abort(name, context, error)

        return collect


def parser_of(method: MethodDescriptor, parsers: Mapping[str, Parser]) -> Parser | None:
    """What replaces a method's parser; None = nothing does."""
    return parsers.get(method.full_name) or parsers.get(method.name)


def _find(handlers: Sequence[object], name: str) -> Any:
    found = [getattr(handler, name) for handler in handlers if hasattr(handler, name)]
    if len(found) > 1:
        raise TypeError(f"{len(found)} handler objects serve {name}; one must")
    return found[0] if found else None


def _parse(parse: Parser, raw: bytes) -> Any:
    try:
        return parse(raw)
    except DecodeError as error:
        raise errors.invalid_field("", "the request's bytes are not a message of this method") from error


def _checked(parse: Parser) -> Parser:
    """A parser that refuses requests whose fields break their limits."""

    def checked(raw: bytes) -> Any:
        request = parse(raw)
        check_request(request)
        return request

    return checked


def _serialise(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


async def _abort(name: str, context: Context, error: Exception) -> NoReturn:
    """End the call with the error as status; what is not ours is logged and shown as INTERNAL."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, errors.StoreError):
        log.error("%s failed", name, exc_info=error)
        error = errors.internal()
    code = _STATUS_CODES[error.code]
    await context.abort(code, error.message, trailing_metadata=error.trailers())
    raise AssertionError("abort returned")  # for the type checker: abort always raises
