"""Brings commits to the disk beside the writer, which carries the next group of commands out meanwhile.

Nobody is answered, and nothing that was read is shown, before the commit that it may come from is on disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

_MOST_AHEAD = 16
"""Most groups that may be committed and not on disk: a disk that stalls stalls the writer."""


class Syncer:
    """A thread that makes commits durable: one sync for all that came during the last one.

    Args:
        sync: Returns when everything that was committed before the call is on disk.
        on_error: Called with what `sync` raised; must not return.
    """

    def __init__(self, sync: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        self._sync = sync
        self._on_error = on_error
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._busy = False
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="store-sync", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Does what waits, then ends the thread. The writer must have ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def settle(self, answer: Callable[[], None], *, at_once: bool) -> None:
        """Calls back when what was committed is on disk, in the order of these calls. Writer's thread.

        Args:
            answer: Called in this thread or the syncer's.
            at_once: Whether the writer has nothing else to do: it then syncs by itself if it can, which saves
                the way to another thread.
        """
        with self._changed:
            if self._busy or self._waiting or not at_once:
                while len(self._waiting) >= _MOST_AHEAD:
                    self._changed.wait()
                self._waiting.append(answer)
                self._changed.notify_all()
                return
        self._finish([answer])

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                while not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait()
                self._busy = True
                answers = list(self._waiting)
                self._waiting.clear()
                self._changed.notify_all()
            self._finish(answers)

    def _finish(self, answers: list[Callable[[], None]]) -> None:
        try:
            self._sync()
        except Exception as error:
            self._on_error(error)
        for answer in answers:
            answer()
