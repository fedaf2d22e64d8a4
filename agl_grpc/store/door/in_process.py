"""A gRPC channel whose other end is in the same process: generated stubs work on it as on any other.

Messages travel as bytes, so that neither side holds what the other may change. Each direction holds few of
them: whoever is faster waits for the other, as on a network.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import grpc

Answer = TypeVar("Answer")
Metadata = Sequence[tuple[str, str | bytes]]

_AT_ONCE = 16
"""Messages that wait in one direction of a call."""


class _Refused(grpc.aio.AbortError):
    """How a handler ends its call: with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        super().__init__(details)
        self.status = (code, details, trailers)


class _Pipe:
    """One direction of a call: one writer, one reader."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._ended = False

    def end(self) -> None:
        """Nothing more is said."""
        self._ended = True
        self._changed.set()

    async def put(self, message: bytes) -> None:
        """Says something; waits while the reader is slow. After the end it goes nowhere."""
        while len(self._messages) >= _AT_ONCE and not self._ended:
            await self._change()
        if not self._ended:
            self._messages.append(message)
            self._changed.set()

    async def get(self) -> bytes | None:
        """What is said next; None = nothing more."""
        while not self._messages:
            if self._ended:
                return None
            await self._change()
        self._changed.set()
        return self._messages.popleft()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _Context:
    """What a handler gets of its call; has of `grpc.aio.ServicerContext` what handlers here use."""

    def __init__(self, requests: _Pipe, answers: _Pipe, metadata: Metadata, deadline: float | None) -> None:
        self._requests = requests
        self._answers = answers
        self._metadata = metadata
        self._deadline = deadline

    def invocation_metadata(self) -> Metadata:
        """What the caller sent along."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds that the caller still waits; None = for ever."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def read(self) -> Any:
        """The caller's next message, or EOF."""
        message = await self._requests.get()
        return grpc.aio.EOF if message is None else message

    async def write(self, answer: bytes) -> None:
        """Says something to the caller."""
        await self._answers.put(answer)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """Ends the call with a status; raises, so that the handler ends too."""
        raise _Refused(code, details, trailing_metadata)


class InProcessCall(Generic[Answer]):
    """A call under way, with the methods of gRPC's own calls: awaited, iterated over, or read and written.

    Args:
        handler: What serves the method.
        requests: What the caller says at once: one message, messages to come, or None = it will write.
        encode: Makes bytes of a request.
        decode: Makes an answer of bytes.
        metadata: What is sent along.
        timeout: Seconds that the caller waits; None = for ever.
    """

    def __init__(
        self,
        handler: Any,
        requests: Any,
        encode: Callable[[Any], bytes],
        decode: Callable[[bytes], Answer],
        metadata: Metadata,
        timeout: float | None,
    ) -> None:
        self._handler = handler
        self._encode, self._decode = encode, decode
        self._requests, self._answers = _Pipe(), _Pipe()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout
        self._context = _Context(self._requests, self._answers, metadata, deadline)
        self._error: grpc.aio.AioRpcError | None = None
        self._cancelled = False
        self.task = asyncio.create_task(self._serve(None if handler.request_streaming else encode(requests)))
        self.task.add_done_callback(self._over)
        self._speaker = None
        if handler.request_streaming and requests is not None:
            self._speaker = asyncio.create_task(self._say(requests))

    async def write(self, request: Any) -> None:
        """Says something; waits while the store is slow to read."""
        if self._error is not None:
            raise self._error
        if self.task.done():
            raise asyncio.InvalidStateError("the call is over")
        await self._requests.put(self._encode(request))

    async def done_writing(self) -> None:
        """Says that this was all."""
        self._requests.end()

    async def read(self) -> Any:
        """The next answer, or EOF."""
        try:
            answer = await self._answers.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if answer is not None:
            return self._decode(answer)
        if self._cancelled:
            raise asyncio.CancelledError
        if self._error is not None:
            raise self._error
        return grpc.aio.EOF

    def cancel(self) -> bool:
        """Breaks the call off; whether it was under way."""
        if self.task.done() or self._cancelled:
            return False
        self._cancelled = True
        self.task.cancel()
        return True

    def drop(self) -> None:
        """Breaks the call off from the store's side."""
        if not self.task.done():
            self._fail(grpc.StatusCode.UNAVAILABLE, "the in-process store was closed", ())
            self.task.cancel()

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._only().__await__()

    async def _only(self) -> Answer:
        answer = await self.read()
        assert answer is not grpc.aio.EOF, "a call with one answer ended without it"
        decoded: Answer = answer
        return decoded

    async def __aiter__(self) -> AsyncIterator[Answer]:
        while (answer := await self.read()) is not grpc.aio.EOF:
            yield answer

    async def _say(self, requests: Iterable[Any] | AsyncIterable[Any]) -> None:
        if isinstance(requests, AsyncIterable):
            async for request in requests:
                await self._requests.put(self._encode(request))
        else:
            for request in requests:
                await self._requests.put(self._encode(request))
        self._requests.end()

    async def _serve(self, request: bytes | None) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._answer(request)
        except _Refused as refused:
            self._fail(*refused.status)
        except TimeoutError:
            self._fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())

    async def _answer(self, request: bytes | None) -> None:
        handler, said = self._handler, self._context if request is None else request
        if handler.request_streaming and handler.response_streaming:
            await handler.stream_stream(said, self._context)
        elif handler.request_streaming:
            await self._answers.put(await handler.stream_unary(said, self._context))
        elif handler.response_streaming:
            answers = handler.unary_stream(said, self._context)
            try:
                async for answer in answers:
                    await self._answers.put(answer)
            finally:
                await answers.aclose()
        else:
            await self._answers.put(await handler.unary_unary(said, self._context))

    def _fail(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        with_trailers = grpc.aio.Metadata.from_tuple(tuple(trailers))
        self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), with_trailers, details)

    def _over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._fail(grpc.StatusCode.INTERNAL, f"the handler failed: {task.exception()!r}", ())
        if self._speaker is not None:
            self._speaker.cancel()
        self._requests.end()
        self._answers.end()


class InProcessChannel(grpc.aio.Channel):
    """See the module.

    Args:
        methods: What serves each path.
        draining: Set when the store is on its way out: no call begins any more.
    """

    def __init__(self, methods: Mapping[str, Any], draining: asyncio.Event) -> None:
        self._methods = methods
        self._draining = draining
        self._calls: set[InProcessCall[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> InProcessChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Ends its calls; those under way have the grace (seconds)."""
        self._closed = True
        tasks = [call.task for call in self._calls]
        if tasks and grace:
            await asyncio.wait(tasks, timeout=grace)
        for call in list(self._calls):
            call.drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Ready until it is closed."""
        closed = self._closed or self._draining.is_set()
        return grpc.ChannelConnectivity.SHUTDOWN if closed else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns when the store is closed, or at once when the state is another already."""
        if self.get_state() is last_observed_state:
            await self._draining.wait()

    async def channel_ready(self) -> None:
        """It always is."""

    def unary_unary(self, method: str, *codecs: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._callable(method, *codecs, **named)

    def unary_stream(self, method: str, *codecs: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._callable(method, *codecs, **named)

    def stream_unary(self, method: str, *codecs: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._callable(method, *codecs, **named)

    def stream_stream(self, method: str, *codecs: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._callable(method, *codecs, **named)

    def _callable(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = None,  # gRPC's generated stubs say it
    ) -> Callable[..., InProcessCall[Any]]:
        encode, decode = request_serializer or bytes, response_deserializer or bytes

        def begin(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Metadata | None = None,
            **_transport: object,  # what only a network has: credentials, compression, wait_for_ready
        ) -> InProcessCall[Any]:
            if self._closed or self._draining.is_set():
                raise grpc.aio.UsageError("the in-process store or the channel to it was closed")
            call = InProcessCall(self._methods[method], request, encode, decode, metadata or (), timeout)
            self._calls.add(call)
            call.task.add_done_callback(lambda _task: self._calls.discard(call))
            return call

        return begin
