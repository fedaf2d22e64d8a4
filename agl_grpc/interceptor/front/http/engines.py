"""Connections to engines, kept open between requests."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

_READ_AHEAD = 256 * 1024
"""So many bytes of an answer wait in memory for a client that reads slowly."""

_MOST_HEAD_BYTES = 256 * 1024


class EngineError(Exception):
    """A request came to nothing; the message says why."""


class CannotConnect(EngineError):
    """No connection: the engine has not seen the request."""


class NoAnswer(EngineError):
    """The engine closed the connection instead of answering."""


class NotHttp(EngineError):
    """What came is no HTTP."""


class BrokenOff(EngineError):
    """The answer began and did not end."""


class Address(NamedTuple):
    """Where an engine is: `prefix` stands before every path, `name` is what it is called in requests."""

    host: str
    port: int
    tls: bool
    prefix: str
    name: str


@lru_cache(4096)
def address_of(url: str) -> Address:
    """The root URL of an engine, taken apart."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    port = parts.port or (443 if tls else 80)
    return Address(host, port, tls, parts.path.rstrip("/"), parts.netloc.rpartition("@")[2])


class EngineClient:
    """Sends requests; connections are reused, none is shared by two requests at a time.

    Times in seconds: `connect_timeout` for a connection, `read_timeout` for the longest silence of an engine.
    """

    def __init__(self, connect_timeout: float, read_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._idle: dict[Address, list[_Connection]] = {}
        self._all: set[_Connection] = set()
        self._tls: ssl.SSLContext | None = None

    async def request(
        self, url: str, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes = b""
    ) -> EngineAnswer:
        """Send a request and wait for the head of its answer.

        Raises EngineError, and TimeoutError for an engine that is silent.
        """
        address = address_of(url)
        idle = self._idle.get(address)
        connection = idle.pop() if idle else await self._connect(address)
        lines = [f"{method} {address.prefix}{path} HTTP/1.1\r\nhost: {address.name}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers]
        if body or method not in ("GET", "HEAD", "DELETE"):
            lines.append(f"content-length: {len(body)}\r\n")
        lines.append("\r\n")
        return await connection.send("".join(lines).encode("latin-1") + body)

    async def close(self) -> None:
        """Close all connections."""
        for connection in list(self._all):
            connection.abort()

    async def _connect(self, address: Address) -> _Connection:
        loop = asyncio.get_running_loop()
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, address, self._read_timeout),
                    address.host,
                    address.port,
                    ssl=self._tls if address.tls else None,
                )
        except TimeoutError:
            raise CannotConnect(f"no connection within {self._connect_timeout:g} s") from None
        except OSError as error:
            raise CannotConnect(error.strerror or str(error)) from error
        self._all.add(connection)
        return connection

    def put_back(self, connection: _Connection, address: Address) -> None:
        """The connection can take another request."""
        self._idle.setdefault(address, []).append(connection)

    def lost(self, connection: _Connection, address: Address) -> None:
        """The connection is gone."""
        self._all.discard(connection)
        idle = self._idle.get(address, [])
        if connection in idle:
            idle.remove(connection)
        if not idle:
            self._idle.pop(address, None)


class EngineAnswer:
    """An answer: its head, and its body as it comes. Header names are in lower case.

    `close` lets go of it: an answer that is not complete is given up, by which the engine learns of it.
    """

    __slots__ = (
        "_connection",
        "_ended",
        "_error",
        "_pieces",
        "_size",
        "_waiter",
        "_whole",
        "headers",
        "status",
    )

    def __init__(self, connection: _Connection, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._connection: _Connection | None = connection
        self.status = status
        self.headers = headers
        self._pieces: list[bytes] = []
        self._size = 0
        self._whole = False
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> str:
        """Media type without parameters; empty when none is stated."""
        for name, value in self.headers:
            if name == b"content-type":
                return value.partition(b";")[0].strip().lower().decode("latin-1")
        return ""

    async def read(self) -> bytes:
        """The whole body; a second call answers the same. Raises BrokenOff, and TimeoutError."""
        self._whole = True
        if not self._ended:
            self._resume()
            await self._more()
        if self._error is not None:
            raise self._error
        if len(self._pieces) > 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0] if self._pieces else b""

    async def piece(self) -> bytes:
        """What has come of the body since the last call; empty at its end.

        Raises BrokenOff, and TimeoutError.
        """
        if not self._pieces and not self._ended:
            await self._more()
        if not self._pieces and self._error is not None:
            raise self._error
        pieces, self._pieces, self._size = self._pieces, [], 0
        self._resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def feed(self, data: bytes) -> bool:
        """Take in a piece; whether so much is waiting that the engine has to."""
        self._pieces.append(data)
        self._size += len(data)
        if self._whole:
            return False
        self._wake()
        return self._size > _READ_AHEAD

    def end(self, error: Exception | None = None) -> None:
        """All of it is there, or no more will come."""
        if not self._ended:
            self._ended, self._error = True, error
            self._wake()

    async def _more(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()


class _Connection(asyncio.Protocol):
    """One connection to an engine: a request, its answer, the next request."""

    def __init__(self, client: EngineClient, address: Address, read_timeout: float) -> None:
        self._client = client
        self._address = address
        self._read_timeout = read_timeout
        self._loop = asyncio.get_running_loop()
        self._parser: Any = None
        self._begun: asyncio.Future[EngineAnswer] | None = None
        self._answer: EngineAnswer | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._complete = False
        self._reusable = False
        self._paused = False
        self._lost = False
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, request: bytes) -> EngineAnswer:
        """Send a request; its answer as soon as its head is there."""
        if self._lost:
            raise NoAnswer("the engine closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._answer, self._complete, self._reusable = None, False, False
        self._headers, self._head_bytes = [], 0
        self._begun = self._loop.create_future()
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(self._read_timeout, self._check_silence)
        self._transport.write(request)
        try:
            return await self._begun
        except BaseException:
            self.abort()
            raise

    def resume(self) -> None:
        """Go on reading."""
        if self._paused and not self._lost:
            self._paused = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    def release(self) -> None:
        """Nobody wants more of the answer: the connection takes another request, or ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._complete and self._reusable and not self._lost:
            self.resume()
            self._answer = self._begun = None
            self._client.put_back(self, self._address)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection."""
        if not self._lost:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._client.lost(self, self._address)
        if self._answer is not None and exc is None and self._until_close():
            self._complete = True
            self._answer.end()
        else:
            self._fail(
                BrokenOff("the engine closed the connection"), NoAnswer("the engine closed the connection")
            )

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        if self._parser is None or self._begun is None:
            self.abort()  # nobody has asked for anything
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenOff(f"what is not HTTP: {error}"), NotHttp(str(error)))
            self.abort()
        else:
            if self._head_bytes > _MOST_HEAD_BYTES:
                self._fail(BrokenOff("headers without end"), NotHttp("headers without end"))
                self.abort()

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # more is to come
        self._answer = EngineAnswer(self, status, self._headers)
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(self._answer)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None and self._answer.feed(data) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._answer is None:
            self._headers = []  # of an interim answer
            return
        # Later the parser has forgotten it.
        self._complete, self._reusable = True, bool(self._parser.should_keep_alive())
        self._answer.end()

    def _until_close(self) -> bool:
        """Whether the answer's end is that of the connection."""
        names = {name for name, _ in self._headers}
        return b"content-length" not in names and b"transfer-encoding" not in names

    def _fail(self, broken: Exception, unanswered: Exception) -> None:
        if self._answer is not None:
            self._answer.end(broken)
        elif self._begun is not None and not self._begun.done():
            self._begun.set_exception(unanswered)

    def _check_silence(self) -> None:
        left = self._heard + self._read_timeout - self._loop.time()
        if left > 0 or self._paused:
            self._timer = self._loop.call_later(max(left, 0.05), self._check_silence)
            return
        self._timer = None
        silent = TimeoutError(f"silent for {self._read_timeout:g} s")
        self._fail(silent, silent)
        self.abort()
