"""How much a peer may make the server do in vain before its connection ends.

A call that is cancelled as soon as it begins costs the peer two small frames and the server a handler, and
it frees its place among the open streams at once: no limit on open streams holds such a peer back ("rapid
reset", CVE-2023-44487). The same holds for frames that make the server itself end a call ("made you reset",
CVE-2025-8671). So ends of this kind are counted, over time.
"""

from __future__ import annotations

MOST_RESETS = 2_000
"""Calls that a peer may break off at once: a fleet's worth of long polls on one connection."""

RESETS_A_SECOND = 200.0
"""And so many a second for ever."""


class Patience:
    """A bucket that holds `most` and fills up again by `rate` a second."""

    __slots__ = ("_left", "_most", "_rate", "_time")

    def __init__(self, now: float, most: int = MOST_RESETS, rate: float = RESETS_A_SECOND) -> None:
        self._most = most
        self._rate = rate
        self._left = float(most)
        self._time = now

    def is_over(self, now: float) -> bool:
        """Counts one more at this moment (seconds); whether that was one too many."""
        self._left = min(self._most, self._left + (now - self._time) * self._rate) - 1.0
        self._time = now
        return self._left < 0.0
