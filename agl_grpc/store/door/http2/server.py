"""The server: listens, finds handlers, runs them, drains."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from agl_grpc.store import errors
from agl_grpc.store.door.http2 import headers
from agl_grpc.store.door.http2.connection import Connection
from agl_grpc.store.door.http2.stream import Stream

log = logging.getLogger(__name__)

_BACKLOG = 1024
_HANDSHAKE_SECONDS = 10.0
_UNKNOWN, _INTERNAL = 2, 13

Serve = Callable[[Any, Stream, Any], Coroutine[Any, Any, None]]
Handler = Any  # grpc.RpcMethodHandler: its stubs know no async handlers


@dataclass
class _Details:
    """What a GenericRpcHandler wants to know of a call."""

    method: str
    invocation_metadata: headers.Metadata


class Http2Server:
    """Serves gRPC; has of `grpc.aio.Server` what generated code and doors use. Belongs to one event loop.

    Args:
        max_message_bytes: Largest message either way.
        keepalive_seconds: A silent client is asked after so long whether it is still there.
        keepalive_timeout: And is given up after so much longer.
    """

    def __init__(
        self, *, max_message_bytes: int, keepalive_seconds: float = 30.0, keepalive_timeout: float = 10.0
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.max_message_bytes = max_message_bytes
        self.keepalive_seconds = keepalive_seconds
        self.keepalive_timeout = keepalive_timeout
        self._generic: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Handler] = {}
        self._connections: set[Connection] = set()
        self._listeners: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds services."""
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: Mapping[str, Handler]) -> None:
        """Generated code offers its methods twice; once is enough."""

    async def listen(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Serves on bound sockets, with TLS if a context for it is given."""
        patience = None if tls is None else _HANDSHAKE_SECONDS
        for one in sockets:
            listener = await self.loop.create_server(
                lambda: Connection(self),
                sock=one,
                backlog=_BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=patience,
            )
            self._listeners.append(listener)

    async def stop(self, grace: float) -> None:
        """Accepts no calls any more, gives those under way so many seconds, then ends them."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.depart()
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            log.info("%d calls did not end in time", len(self._tasks))
        for connection in list(self._connections):
            connection.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # What connections call

    def enter(self, connection: Connection) -> None:
        """A client has come."""
        self._connections.add(connection)

    def leave(self, connection: Connection) -> None:
        """A client has gone."""
        self._connections.discard(connection)

    def begin(self, stream: Stream) -> None:
        """A call's headers are there. Calls of one message start when that is there too."""
        handler = self._handler(stream.head)
        if handler is None:
            refusal = errors.method_unknown(stream.head.path)
            stream.finish(headers.trailers(refusal.code, refusal.message, refusal.trailers()))
            return
        stream.parse, stream.serialise = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming:
            many = handler.response_streaming
            method = handler.stream_stream if many else handler.stream_unary
            self._run(stream, _many if many else _one, method, _requests(stream))

    def complete(self, stream: Stream) -> None:
        """The caller has said all."""
        if stream.closed or stream.task is not None:
            return
        handler = self._handler(stream.head)
        try:
            request = stream.request()
        except DecodeError:
            request = None
        if request is None:
            stream.finish(headers.trailers(_INTERNAL, "a call of this method has exactly one whole message"))
        elif handler.response_streaming:
            self._run(stream, _many, handler.unary_stream, request)
        else:
            self._run(stream, _one, handler.unary_unary, request)

    def _handler(self, head: headers.RequestHead) -> Handler:
        found = self._handlers.get(head.path)
        if found is None:
            details = _Details(head.path, head.metadata)
            for generic in self._generic:
                found = generic.service(details)
                if found is not None:
                    self._handlers[head.path] = found
                    break
        return found

    def _run(self, stream: Stream, serve: Serve, method: Any, request: Any) -> None:
        task = self.loop.create_task(_guarded(stream, serve, method, request))
        stream.task = task
        self._tasks.add(task)
        self._idle.clear()
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()


async def _guarded(stream: Stream, serve: Serve, method: Any, request: Any) -> None:
    """Runs a handler; whatever it raises ends its call with a status."""
    try:
        await serve(method, stream, request)
    except grpc.aio.AbortError:
        pass  # the status has been sent
    except asyncio.CancelledError:
        stream.finish(headers.trailers(1, "cancelled"))
    except Exception as error:
        log.exception("%s failed", stream.head.path)
        stream.finish(headers.trailers(_UNKNOWN, f"the handler failed: {type(error).__name__}"))


async def _one(method: Any, stream: Stream, request: Any) -> None:
    stream.answer(await method(request, stream))


async def _many(method: Any, stream: Stream, request: Any) -> None:
    """Answers come from an iterator, or the handler writes them by itself."""
    answers = method(request, stream)
    if hasattr(answers, "__aiter__"):
        try:
            async for answer in answers:
                await stream.write(answer)
        finally:
            await answers.aclose()
    else:
        await answers
    stream.finish(headers.OK)


async def _requests(stream: Stream) -> AsyncIterator[Any]:
    while (request := await stream.read()) is not grpc.aio.EOF:
        yield request
