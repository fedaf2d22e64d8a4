"""One call on a connection: messages in, messages out, each side slowed down by the other (RFC 9113 §5.2)."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from agl_grpc.store.door.http2 import frames, headers
from agl_grpc.store.door.http2.frames import Code

if TYPE_CHECKING:
    from agl_grpc.store.door.http2.connection import Connection

RECEIVE_WINDOW = 1 << 20
"""Bytes of whole messages that a call may have waiting before its caller is held back."""

_PREFIX_BYTES = 5
_LAST_HEADERS = frames.END_HEADERS | frames.END_STREAM


class Stream:
    """What a handler gets as its context; has of `grpc.aio.ServicerContext` what handlers here use.

    Args:
        connection: Where it came from.
        stream_id: Its number there.
        head: The request's headers.
        send_window: Bytes that the caller takes at first.
    """

    def __init__(
        self, connection: Connection, stream_id: int, head: headers.RequestHead, send_window: int
    ) -> None:
        self.stream_id = stream_id
        self.head = head
        self.send_window = send_window
        self.parse: Callable[[bytes], Any] | None = None
        """Makes a request of its bytes; None = handlers take bytes."""
        self.serialise: Callable[[Any], bytes] | None = None
        """Makes bytes of an answer; None = handlers give bytes."""
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.closed = False
        """Nothing more can be sent."""
        self.ended = False
        """The caller has said all."""
        self._connection = connection
        self._deadline = None if head.timeout is None else time.monotonic() + head.timeout
        self._messages: deque[bytes] = deque()
        self._parts: list[bytes] = []
        self._size = 0
        self._unread = 0
        self._owed = 0
        self._reader: asyncio.Future[None] | None = None
        self._out: deque[memoryview] = deque()
        self._last: bytes | None = None
        self._writer: asyncio.Future[None] | None = None
        self._began = False

    # What handlers call

    def invocation_metadata(self) -> headers.Metadata:
        """What the caller sent along."""
        return self.head.metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None = it has none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def read(self) -> Any:
        """The next request, or `grpc.aio.EOF` when the caller has said all."""
        while not self._messages:
            if self.ended:
                return grpc.aio.EOF
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._next()
        return message if self.parse is None else self.parse(message)

    async def write(self, answer: Any) -> None:
        """Sends an answer; waits while the caller takes none."""
        self._queue(answer if self.serialise is None else self.serialise(answer))
        self._pump()
        while (self._out or self._connection.paused) and not self.closed:
            self._writer = self._connection.loop.create_future()
            self._connection.writers.add(self)
            await self._writer
        if self.closed:
            raise asyncio.CancelledError

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """Ends the call with a status; raises, so that the handler ends too."""
        self.finish(headers.trailers(code.value[0], details, trailing_metadata))
        raise grpc.aio.AbortError

    # What arrives

    def receive(self, data: bytes, size: int) -> None:
        """Takes data of a frame that had so many bytes.

        Raises:
            MessageTooLarge, BadMessage: The call cannot go on.
        """
        self._owed += size
        found = False
        if not self._parts and len(data) >= _PREFIX_BYTES:
            # The usual case: a frame holds just one message.
            length = int.from_bytes(data[1:_PREFIX_BYTES], "big")
            if len(data) == length + _PREFIX_BYTES:
                self._take(data[0], data[_PREFIX_BYTES:])
                found = True
        if data and not found:
            self._parts.append(data)
            self._size += len(data)
            found = self._assemble()
        if found:
            self._wake_reader()
        self._settle()

    def _assemble(self) -> bool:
        """Takes every whole message out of the parts; returns whether there was one."""
        if self._size < _PREFIX_BYTES:
            return False
        if len(self._parts[0]) < _PREFIX_BYTES:
            self._parts = [b"".join(self._parts)]
        if self._size < self._length(self._parts[0], 0):
            return False
        data, start, size = b"".join(self._parts), 0, self._size
        while size - start >= _PREFIX_BYTES and size - start >= (length := self._length(data, start)):
            self._take(data[start], data[start + _PREFIX_BYTES : start + length])
            start += length
        self._parts, self._size = ([data[start:]] if start < size else []), size - start
        return True

    def _length(self, data: bytes, start: int) -> int:
        """Bytes of the message that begins here, with its prefix."""
        size = int.from_bytes(data[start + 1 : start + _PREFIX_BYTES], "big")
        if size > self._connection.max_message_bytes:
            raise MessageTooLarge(size)
        return size + _PREFIX_BYTES

    def _take(self, compressed: int, message: bytes) -> None:
        limit = self._connection.max_message_bytes
        if compressed:
            message = _decompress(message, self.head.encoding, limit)
        if len(message) > limit:
            raise MessageTooLarge(len(message))
        self._messages.append(message)
        self._unread += len(message)

    def end(self) -> None:
        """The caller has said all."""
        self.ended = True
        self._wake_reader()

    def request(self) -> Any:
        """The request of a call of one message; None when there is not exactly one."""
        if len(self._messages) != 1 or self._parts:
            return None
        message = self._next()
        return message if self.parse is None else self.parse(message)

    def _next(self) -> bytes:
        message = self._messages.popleft()
        self._unread -= len(message)
        self._settle()
        return message

    def _settle(self) -> None:
        """Lets the caller send more for what has arrived, unless too much of it is still unread."""
        if self._owed >= RECEIVE_WINDOW // 2 and self._unread < RECEIVE_WINDOW and not self.ended:
            self._connection.send(frames.window_update(self.stream_id, self._owed))
            self._owed = 0

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # What leaves

    def answer(self, answer: Any) -> None:
        """Sends the one answer of a call and ends it."""
        message = answer if self.serialise is None else self.serialise(answer)
        size = len(message) + _PREFIX_BYTES
        connection = self._connection
        if self.closed:
            return
        if size > min(self.send_window, connection.send_window, connection.frame_bytes):
            self._queue(message)
            self.finish(headers.OK)
            return
        connection.send_window -= size
        number = self.stream_id
        self._close(
            b"".join(
                (
                    frames.header(len(headers.RESPONSE), frames.HEADERS, frames.END_HEADERS, number),
                    headers.RESPONSE,
                    frames.header(size, frames.DATA, 0, number),
                    b"\0",
                    len(message).to_bytes(4, "big"),
                    message,
                    frames.header(len(headers.OK), frames.HEADERS, _LAST_HEADERS, number),
                    headers.OK,
                )
            )
        )

    def finish(self, trailers: bytes) -> None:
        """Ends the call with these trailers once all messages are out."""
        if self.closed or self._last is not None:
            return
        self._last = trailers
        self._pump()

    def refuse(self, status: int) -> None:
        """Answers what is no gRPC request."""
        block = headers.http_problem(status)
        self._close(frames.frame(frames.HEADERS, _LAST_HEADERS, self.stream_id, block))

    def pump(self) -> None:
        """The caller takes more: sends what waits."""
        self._pump()
        if not self._out and not self._connection.paused:
            self._wake_writer()

    def _queue(self, message: bytes) -> None:
        if self._last is None and not self.closed:
            self._out.append(memoryview(b"\0" + len(message).to_bytes(4, "big") + message))

    def _pump(self) -> None:
        connection = self._connection
        if self.closed:
            return
        if not self._began and (self._out or self._last is None):
            self._began = True
            connection.send(
                frames.frame(frames.HEADERS, frames.END_HEADERS, self.stream_id, headers.RESPONSE)
            )
        while self._out:
            room = min(self.send_window, connection.send_window, connection.frame_bytes)
            # A peer's windows may be far larger than what should wait in this process's memory.
            if room <= 0 or connection.paused:
                connection.writers.add(self)
                return
            part = self._out[0][:room]
            size = len(part)
            connection.send(frames.header(size, frames.DATA, 0, self.stream_id) + part)
            self.send_window -= size
            connection.send_window -= size
            if size == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][size:]
        if self._last is not None:
            block = self._last if self._began else headers.RESPONSE + self._last
            self._close(frames.frame(frames.HEADERS, _LAST_HEADERS, self.stream_id, block))

    def _close(self, farewell: bytes) -> None:
        if not self.ended:
            # The caller need not say the rest.
            farewell += frames.reset(self.stream_id, Code.NO_ERROR)
        self._connection.send(farewell)
        self.lose()

    def lose(self) -> None:
        """Nothing more is read or sent."""
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        if self.timer is not None:
            self.timer.cancel()
        self._connection.forget(self)
        self._wake_writer()

    def _wake_writer(self) -> None:
        self._connection.writers.discard(self)
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)


class MessageTooLarge(Exception):
    """A message is larger than the server takes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class BadMessage(Exception):
    """A message cannot be read; the text says why."""


def _decompress(message: bytes, encoding: bytes, limit: int) -> bytes:
    if encoding not in (b"gzip", b"deflate"):
        raise BadMessage(f"compressed with {encoding.decode('latin-1')!r}; use gzip, deflate or nothing")
    machine = zlib.decompressobj(31 if encoding == b"gzip" else zlib.MAX_WBITS)
    try:
        plain = machine.decompress(message, limit + 1)
    except zlib.error as error:
        raise BadMessage(f"not {encoding.decode()}: {error}") from error
    if len(plain) > limit:
        raise MessageTooLarge(len(plain))
    if not machine.eof:
        raise BadMessage(f"a {encoding.decode()} message that ends too early")
    return plain
