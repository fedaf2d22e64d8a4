"""The proxy's HTTP door: requests as they come, answers whole or as streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools

logger = logging.getLogger("agl_grpc.interceptor")

Handle = Callable[["Incoming"], Awaitable[None]]
RawHeaders = Iterable[tuple[bytes, bytes]]

_KEEPALIVE_SECONDS = 75.0
_SWEEP_SECONDS = 5.0
_LINGER_SECONDS = 10.0
"""How long the rest of a body that nobody wants may come, once its request is answered."""

_MOST_HEAD_BYTES = 64 * 1024
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BodyTooLarge(Exception):
    """The request's body has more bytes than are read."""


class Incoming:
    """A request, and how it is answered: by `answer`, or by `stream`.

    `target` is path and query as they came; `headers` have lower-case names, repeated ones joined.
    """

    __slots__ = (
        "_body",
        "_complete",
        "_connection",
        "_size",
        "_waiter",
        "headers",
        "keep",
        "method",
        "target",
    )

    def __init__(
        self, connection: _Connection, method: str, target: str, headers: dict[str, str], keep: bool
    ) -> None:
        self._connection = connection
        self._body: list[bytes] | None = []
        self._size = 0
        self._complete = False
        self._waiter: asyncio.Future[None] | None = None
        self.method = method
        self.target = target
        self.headers = headers
        self.keep = keep

    async def read(self) -> bytes:
        """The whole body. Raises BodyTooLarge; a client that leaves cancels the task that waits."""
        if not self._complete and self._body is not None:
            if self.headers.get("expect", "").lower() == "100-continue":
                self._connection.write(_CONTINUE)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._body is None:
            raise BodyTooLarge
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    def answer(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """Answer as a whole."""
        self._connection.answer(self, status, headers, body)

    def stream(self, status: int, headers: RawHeaders) -> Stream:
        """Begin an answer whose length is not known."""
        return self._connection.stream(self, status, headers)

    def feed(self, data: bytes, limit: int) -> None:
        """Take in a piece of the body, of which at most `limit` bytes are kept."""
        if self._body is None:
            return
        self._body.append(data)
        self._size += len(data)
        if self._size > limit:
            self.refuse_body()

    def refuse_body(self) -> None:
        """What comes of the body is not kept."""
        self._body = None
        self._wake()

    def end(self) -> None:
        """The body is there."""
        self._complete = True
        self._wake()

    @property
    def complete(self) -> bool:
        """Whether all of the request has come."""
        return self._complete

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Stream:
    """An answer under way."""

    __slots__ = ("_chunked", "_connection")

    def __init__(self, connection: _Connection, chunked: bool) -> None:
        self._connection = connection
        self._chunked = chunked

    async def write(self, data: bytes) -> None:
        """Send a piece; waits while the client does not read. Raises ConnectionResetError when it is gone."""
        if data:
            self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
            await self._connection.drained()

    def end(self) -> None:
        """The answer is complete."""
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")


class Handover(Protocol):
    """Other processes that serve the same address."""

    def elsewhere(self, target: str, headers: Mapping[str, str]) -> int | None:
        """Which of them has to serve a request; None: this one."""
        ...

    def give(self, owner: int, connection: int, data: bytes) -> None:
        """Hand it a connection (a file descriptor, which this takes) and what was read of it."""
        ...


class Door:
    """Serves HTTP/1.1 on a listening socket: each request is a task of its own, cancelled when its client
    leaves. Bodies of more than `max_body` bytes are not read.
    """

    def __init__(self, handle: Handle, max_body: int) -> None:
        self.handle = handle
        self.max_body = max_body
        self.connections: set[_Connection] = set()
        self.closing = False
        self.peers: Handover | None = None
        self._taking: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def open(self, listening: socket.socket) -> None:
        """Serve from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), sock=listening, backlog=2048)
        self._sweep = loop.call_later(_SWEEP_SECONDS, self._close_idle)

    def take(self, connection: socket.socket, data: bytes) -> None:
        """Serve a connection that another process has accepted, from the bytes on that it has read."""
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        task = loop.create_task(loop.connect_accepted_socket(lambda: _Connection(self, data), connection))
        self._taking.add(task)
        task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._taking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a connection that was handed over is gone: %s", error)

    def close(self) -> None:
        """Take no new connections and close those that are idle; requests under way go on."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self.connections):
            connection.close_if_idle()

    async def shutdown(self) -> None:
        """End what still runs."""
        tasks = [connection.abort() for connection in list(self.connections)]
        running = [task for task in tasks if task is not None]
        if running:
            await asyncio.wait(running)

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self.connections):
            connection.close_if_idle(loop.time() - _KEEPALIVE_SECONDS)
        self._sweep = loop.call_later(_SWEEP_SECONDS, self._close_idle)


class _Connection(asyncio.Protocol):
    """One agent's connection: parses requests and serves them one after the other."""

    def __init__(self, door: Door, first: bytes = b"") -> None:
        self._door = door
        self._first = first
        self._head: bytearray | None = None
        self._begun = False
        self._elsewhere: int | None = None
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._idle_since = self._loop.time()
        self._waiting: deque[Incoming] = deque()
        self._reading: Incoming | None = None
        self._task: asyncio.Task[None] | None = None
        self._serving: Incoming | None = None
        self._answered = False
        self._resumed: asyncio.Future[None] | None = None
        self._target = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._declining = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._door.connections.add(self)
        if self._first:
            self.data_received(self._first)
            self._first = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._door.connections.discard(self)
        self._waiting.clear()
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._resumed = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        self._resumed = None

    def data_received(self, data: bytes) -> None:
        if self._door.peers is not None:
            self._keep_head(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._elsewhere is None:
                self._decline_upgrade(data[upgrade.args[0] :])
                return
        except httptools.HttpParserError:
            if self._elsewhere is None:
                self._refuse(400)
                return
        if self._elsewhere is not None:
            self._hand_over()
        elif self._head_bytes > _MOST_HEAD_BYTES:
            self._refuse(431)

    def _keep_head(self, data: bytes) -> None:
        """Keep what is read until a request's head is there, if it began between two requests."""
        if self._head is not None:
            self._head += data
        elif self._task is None and self._reading is None and not self._begun:
            self._head = bytearray(data)

    def _hand_over(self) -> None:
        """The connection to the process whose rollout it carries; here it is gone."""
        assert self._door.peers is not None
        assert self._elsewhere is not None
        assert self._head is not None
        self._transport.pause_reading()
        connection = os.dup(self._transport.get_extra_info("socket").fileno())
        self._door.peers.give(self._elsewhere, connection, bytes(self._head))
        self._transport.abort()

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self._declining or self._elsewhere is not None:
            return
        self._begun = True
        self._target = b""
        self._headers = {}
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._declining or self._elsewhere is not None:
            return
        self._head_bytes += len(name) + len(value)
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        if key in self._headers:
            text = f"{self._headers[key]}{'; ' if key == 'cookie' else ', '}{text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        if self._declining or self._head_bytes > _MOST_HEAD_BYTES or self._elsewhere is not None:
            return
        self._head_bytes = 0
        self._begun = False
        head, self._head = self._head, None
        if head is not None and self._door.peers is not None:
            self._elsewhere = self._door.peers.elsewhere(self._target.decode("latin-1"), self._headers)
            if self._elsewhere is not None:
                self._head = head
                return
        request = self._reading = Incoming(
            self,
            self._parser.get_method().decode("latin-1"),
            self._target.decode("latin-1"),
            self._headers,
            bool(self._parser.should_keep_alive()),
        )
        length = self._headers.get("content-length", "")
        if length.isdigit() and int(length) > self._door.max_body:
            request.refuse_body()
        if self._task is None:
            self._serve(request)
        else:
            # A client that does not wait for answers: one request ahead is enough.
            self._waiting.append(request)
            self._transport.pause_reading()

    def on_body(self, data: bytes) -> None:
        if self._reading is not None:
            self._reading.feed(data, self._door.max_body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        if self._reading is not None:
            self._reading.end()
        self._reading = None

    def _decline_upgrade(self, rest: bytes) -> None:
        """Clients that offer HTTP/2 are served as they are; the parser would not read a body after that."""
        reading = self._reading
        if reading is None:
            self._refuse(400)
            return
        length = reading.headers.get("content-length", "")
        framing = "transfer-encoding: chunked" if "transfer-encoding" in reading.headers else ""
        head = f"POST / HTTP/1.1\r\n{framing or f'content-length: {length or 0}'}\r\n\r\n".encode()
        self._parser = httptools.HttpRequestParser(self)
        self._declining = True
        self._parser.feed_data(head)
        self._declining = False
        if rest:
            self.data_received(rest)

    # Called by requests and streams.

    def write(self, data: bytes) -> None:
        """Send bytes. Raises ConnectionResetError when the client has left."""
        if self._lost or self._transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the client has read most of what was sent."""
        if self._resumed is not None:
            await self._resumed

    def answer(self, request: Incoming, status: int, headers: RawHeaders, body: bytes) -> None:
        """Head and body."""
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        lines += [b"%b: %b\r\n" % pair for pair in headers]
        lines.append(b"content-length: %d\r\n" % len(body))
        lines.append(b"\r\n" if request.keep else b"connection: close\r\n\r\n")
        lines.append(body)
        self._answered = True
        self.write(b"".join(lines))

    def stream(self, request: Incoming, status: int, headers: RawHeaders) -> Stream:
        """The head; the body follows."""
        chunked = self._parser.get_http_version() != "1.0"
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        lines += [b"%b: %b\r\n" % pair for pair in headers]
        lines.append(b"transfer-encoding: chunked\r\n" if chunked else b"")
        request.keep = request.keep and chunked
        lines.append(b"\r\n" if request.keep else b"connection: close\r\n\r\n")
        self._answered = True
        self.write(b"".join(lines))
        return Stream(self, chunked)

    # Called by the door.

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._task is not None

    def close_if_idle(self, before: float = float("inf")) -> None:
        """Close the connection when no request has been under way on it since `before`."""
        if self._task is None and self._idle_since < before:
            self._transport.close()

    def abort(self) -> asyncio.Task[None] | None:
        """End the connection and what runs on it, which is returned."""
        task = self._task
        self._transport.abort()
        if task is not None:
            task.cancel()
        return task

    def _serve(self, request: Incoming) -> None:
        self._answered = False
        self._serving = request
        self._task = self._loop.create_task(self._run(request))

    async def _run(self, request: Incoming) -> None:
        try:
            await self._door.handle(request)
        except (asyncio.CancelledError, ConnectionError):
            self._transport.abort()
            return
        except Exception:  # a defect here must not take the door down with it
            logger.exception("request of %s failed", request.target)
            request.keep = False
            if self._answered:
                self._transport.abort()
                return
            with contextlib.suppress(ConnectionError):
                self.answer(request, 500, (), b"")
        self._next(request)

    def _next(self, request: Incoming) -> None:
        """The request is answered: on to the next one, if there is to be one."""
        self._task = self._serving = None
        self._idle_since = self._loop.time()
        if not request.keep or self._door.closing:
            self._transport.close()
            return
        if not request.complete:
            request.refuse_body()
            self._loop.call_later(_LINGER_SECONDS, self._end_lingering, request)
        if self._waiting:
            following = self._waiting.popleft()
            self._transport.resume_reading()
            self._serve(following)

    def _end_lingering(self, request: Incoming) -> None:
        if not request.complete:
            self._transport.close()

    def _refuse(self, status: int) -> None:
        """What came is no request: say so and hang up."""
        if not self._lost and self._task is None:
            self._transport.write(b"%bconnection: close\r\ncontent-length: 0\r\n\r\n" % _STATUS_LINES[status])
        self._transport.close()
