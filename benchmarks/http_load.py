"""A client that only waits: raw HTTP/1.1 over kept connections, so that what is measured is the server."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, cast


class Timing(NamedTuple):
    """Seconds from sending to the first byte of the answer's body and to its end; its status."""

    first: float
    total: float
    status: int


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self._done: asyncio.Future[Timing] | None = None
        self._buffer = bytearray()
        self._sent = self._first = 0.0

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """A connection to a server."""
        _, made = await asyncio.get_running_loop().create_connection(cls, host, port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the server closed the connection"))

    async def send(self, path: str, body: bytes, headers: bytes = b"") -> Timing:
        """Send a request and wait for the whole answer."""
        self._done = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        self._first = 0.0
        head = (
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
        )
        self._sent = time.perf_counter()
        self._transport.write(head % (path.encode(), headers, len(body)) + body)
        return await self._done

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._done is None or self._done.done():
            return
        if not self._first and len(self._buffer) > end + 4:
            self._first = time.perf_counter()
        head = bytes(self._buffer[:end]).lower()
        found = head.find(b"content-length:")
        if found >= 0:
            stop = head.find(b"\r\n", found)
            length = int(head[found + 15 : stop if stop >= 0 else len(head)])
            complete = len(self._buffer) >= end + 4 + length
        else:
            complete = self._buffer.endswith(b"\r\n0\r\n\r\n")
        if complete:
            now = time.perf_counter()
            first = (self._first or now) - self._sent
            self._done.set_result(Timing(first, now - self._sent, int(head[9:12])))
