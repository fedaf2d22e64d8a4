"""Replays HTTP requests over many connections, each one after the other, reading as little as it can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.clients import Start

Requests = Callable[[int], Iterator[bytes]]
"""Endless requests of one connection, by its number."""


def post(path: str, body: bytes, host: str = "store") -> bytes:
    """A request on the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """One caller: sends, waits for the whole answer, sends the next."""

    def __init__(self, requests: Iterator[bytes], until: float) -> None:
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._until = until
        self._rest = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        # Uvloop's transports have no base in common with asyncio's.
        self._transport: Any = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server may not close."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Counts whole answers; anything but success ends the measurement."""
        self._rest += data
        head, found, body = self._rest.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) < length:
            return
        now = time.perf_counter()
        if not head.startswith(b"HTTP/1.1 2"):
            self.done.set_exception(RuntimeError(self._rest[:500].decode(errors="replace")))
            return
        self.latencies.append(now - self._sent)
        self._rest = body[length:]
        if now < self._until:
            self._send()
        else:
            self.done.set_result(None)
            self._transport.close()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))


async def replay(
    start: Start, host: str, port: int, requests: Requests, connections: int, seconds: float
) -> tuple[list[float], float]:
    """Calls for so long; the latencies of all calls in seconds, and how long it took."""
    await start()
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    callers = []
    for number in range(connections):
        _, caller = await loop.create_connection(
            lambda number=number: _Connection(requests(number), begun + seconds), host, port
        )
        callers.append(caller)
    await asyncio.gather(*(caller.done for caller in callers))
    return [one for caller in callers for one in caller.latencies], time.perf_counter() - begun
