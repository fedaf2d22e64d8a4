"""A long load on one server: its memory must stay where it was.

Rollouts live from enqueue to completion, one call a step, as fast as a few clients at once get them through,
beside a steady stream of spans to attempts that never end. The server's memory is read every few seconds.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.clients import run_clients
from benchmarks.database import grown
from benchmarks.ingest import Kind, stream_spans
from benchmarks.lives import live_for
from benchmarks.messages import Attempt
from benchmarks.servers import Server, folder, store_server

MESSAGES_PER_SECOND = 60.0
SPANS_PER_MESSAGE = 100
"""6,000 spans a second: half an hour of them leaves room on a small disk."""

_LOOPS = 4
_READ_SECONDS = 5.0
_LIMIT_MIB = 16.0
"""By how much the last third may lie above the one before: a leak of 1 KB for each life would be far more."""


def prove(minutes: float, tell: Callable[[int], None]) -> dict[str, Any]:
    """Loads a server for so long; what it carried, and its memory over time.

    Raises:
        AssertionError: Its memory went on growing.
    """
    seconds = 60 * minutes
    with folder() as place:
        attempts = grown(place / "store.db", 0)
        with store_server(place / "store.db") as server, _Memory(server, seconds, tell) as memory:
            done = run_clients(server, 1, load, server.address, attempts, seconds, limit=seconds + 300)
    ((lives, spans),) = done.results
    thirds = memory.thirds()
    assert thirds[2] - thirds[1] <= _LIMIT_MIB, f"memory grew: {memory.readings}"
    return {
        "lives": round(lives * done.seconds),
        "spans": spans,
        "server CPU, share of one core": round(done.server_cpu / done.seconds, 2),
        "RSS by third, MiB": [round(third, 1) for third in thirds],
        "highest RSS, MiB": round(max(memory.readings), 1),
    }


async def load(start: Any, address: str, attempts: list[Attempt], seconds: float) -> tuple[float, int]:
    """Lives and spans for so long: lives a second, and acknowledged spans."""
    await start()
    kind = Kind("spans", SPANS_PER_MESSAGE, 1, MESSAGES_PER_SECOND)
    (spans, _), lives = await asyncio.gather(
        stream_spans(_at_once, address, kind, attempts, seconds),
        live_for(_at_once, address, False, 1, _LOOPS, seconds),
    )
    return lives, spans


async def _at_once() -> None:
    """The common start has been."""


class _Memory:
    """Reads a server's memory beside the load; a context manager."""

    def __init__(self, server: Server, seconds: float, tell: Callable[[int], None]) -> None:
        self.readings: list[float] = []
        self._server = server
        self._seconds = seconds
        self._tell = tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="memory")

    def _read(self) -> None:
        begun = time.monotonic()
        while not self._over.wait(_READ_SECONDS):
            self.readings.append(self._server.rss)
            self._tell(int((time.monotonic() - begun) / 60))

    def thirds(self) -> list[float]:
        """The middle reading of each third of the time, in MiB."""
        size = len(self.readings) // 3
        assert size, f"a soak of {self._seconds:g} s is too short to be one"
        return [statistics.median(self.readings[at * size : (at + 1) * size]) for at in range(3)]

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
