"""Time as the store counts it: integer microseconds since the epoch."""

from __future__ import annotations

import time
from typing import Protocol

SECOND = 1_000_000
"""Microseconds of a second."""


class Clock(Protocol):
    """Where the store's time comes from."""

    def now(self) -> int:
        """Microseconds since the epoch; never falls."""
        ...


class SystemClock:
    """Wall time at start plus monotonic time since: a step of the machine's clock moves no lease.

    Args:
        after: Microseconds since the epoch that have been told before: a clock that was set back while no
            server ran goes on from there.
    """

    def __init__(self, after: int = 0) -> None:
        self._base = max(time.time_ns(), after * 1000) - time.monotonic_ns()

    def now(self) -> int:
        """Microseconds since the epoch."""
        return (self._base + time.monotonic_ns()) // 1000


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, start: int = 1_700_000_000 * SECOND) -> None:
        self._now = start

    def now(self) -> int:
        """Microseconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves the clock forward."""
        self._now += int(seconds * SECOND)
