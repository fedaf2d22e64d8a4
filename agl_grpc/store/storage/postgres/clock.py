"""The database's clock, as all servers of one database know it (R9)."""

from __future__ import annotations

import time


class DatabaseClock:
    """The database's time, carried on with this machine's monotonic clock since it was last asked."""

    def __init__(self) -> None:
        self._offset = time.time_ns() // 1000 - time.monotonic_ns() // 1000
        self._last = 0

    def keep(self, database_time: int) -> None:
        """The database has just said what time it is, in microseconds."""
        self._offset = database_time - time.monotonic_ns() // 1000

    def now(self) -> int:
        """Microseconds since the epoch; never falls."""
        now = max(self._last, self._offset + time.monotonic_ns() // 1000)
        self._last = now
        return now
