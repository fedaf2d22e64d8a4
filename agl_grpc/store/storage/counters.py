"""What every group of commands must know: one row of the database, read when it begins, written when it ends.

Keys given out so far: what a command that comes to nothing had taken stays a hole; no key is ever given out
twice, also not after the newest rows were deleted. And when the store last came back from being away.
"""

from __future__ import annotations

from typing import Protocol

NAMES = ("rollouts", "attempts", "spans", "events", "catalog", "returned")
"""What is counted: rows of three tables, positions of the event log, changes of cached rows; and a moment in
microseconds, that of the store's return (0 = it never was away)."""

SELECT = f"SELECT {', '.join(NAMES)} FROM counters"


class _Executes(Protocol):
    def execute(self, sql: str, values: tuple[int, ...], /) -> object: ...


class Counters:
    """The counters of one group of commands. Writer's thread only."""

    __slots__ = ("_last", "_stored")

    def __init__(self, stored: tuple[int, ...]) -> None:
        self._stored = stored
        self._last = dict(zip(NAMES, stored, strict=True))

    def take(self, name: str, count: int = 1) -> int:
        """The first of `count` keys that nobody has."""
        first = self._last[name] + 1
        self._last[name] += count
        return first

    def last(self, name: str) -> int:
        """The newest key given out; 0 = none."""
        return self._last[name]

    def put(self, name: str, value: int) -> None:
        """Sets what is no key."""
        self._last[name] = value

    def changed(self) -> bool:
        """Whether anything is to be written."""
        return tuple(self._last.values()) != self._stored

    def save(self, connection: _Executes) -> None:
        """Writes what has changed, in the group's transaction."""
        if self.changed():
            self._stored = tuple(self._last.values())
            connection.execute(_UPDATE, self._stored)


_UPDATE = f"UPDATE counters SET {', '.join(f'{name} = ?' for name in NAMES)}"
