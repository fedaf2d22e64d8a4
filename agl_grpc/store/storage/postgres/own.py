"""Which entries of the event log this process wrote itself."""

from __future__ import annotations

import threading
from collections import deque

END = (1 << 63) - 1
"""No entry has this position."""


class OwnEntries:
    """Filled by the writer, emptied by the follower, each in its thread.

    Attributes:
        committing: Held by the writer from before a commit until its entries are added: others see them from
            the commit on, and a follower that read them in between would take them for somebody else's.
    """

    def __init__(self) -> None:
        self.committing = threading.Lock()
        self._groups: deque[tuple[int, int]] = deque()

    def add(self, first: int, last: int) -> None:
        """The writer's group that is being committed has these entries, from `first` to `last`."""
        self._groups.append((first, last))

    def skip(self, position: int) -> int:
        """Where to read on after a position: behind the own entries that follow it without a gap."""
        while self._groups and self._groups[0][0] <= position + 1:
            position = max(position, self._groups.popleft()[1])
        return position

    def next(self) -> int:
        """The first own entry that is not yet skipped; `END` = there is none."""
        return self._groups[0][0] if self._groups else END

    def next_settled(self) -> int:
        """Like `next`, after the commit that is under way."""
        with self.committing:
            return self.next()
