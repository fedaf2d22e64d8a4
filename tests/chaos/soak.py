"""A long load on one server: its memory must stay where it was.

Rollouts live from enqueue to completion, one call a step, beside a steady stream of spans to attempts that
never end, at 70 % of what was measured first to be this machine's ceiling. The server's memory is read every
few seconds.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.database import grown
from benchmarks.servers import Server, folder, store_server
from benchmarks.steady import SHARE, ceiling, steady

_CEILING_SECONDS = 20.0
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
        with store_server(place / "store.db") as server:
            most = ceiling(server, attempts, _CEILING_SECONDS)
            with _Memory(server, seconds, tell) as memory:
                done = steady(server, attempts, seconds, SHARE * most.lives)
    thirds = memory.thirds()
    assert thirds[2] - thirds[1] <= _LIMIT_MIB, f"memory grew: {memory.readings}"
    return {
        "lives a second at the ceiling": round(most.lives, 1),
        "load, share of the ceiling": round(done.lives / most.lives, 2),
        "lives": round(done.lives * done.seconds),
        "spans": done.spans,
        "server CPU, share of one core at the ceiling": round(most.server_cpu / most.seconds, 2),
        "server CPU, share of one core": round(done.server_cpu / done.seconds, 2),
        "RSS by third, MiB": [round(third, 1) for third in thirds],
        "highest RSS, MiB": round(max(memory.readings), 1),
    }


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
