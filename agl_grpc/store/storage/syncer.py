"""Brings commits to the disk beside the writer, which carries the next group of commands out meanwhile.

Nobody is answered, and nothing that was read is shown, before the commit that it may come from is on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NoReturn


class Syncer:
    """A thread that makes one commit durable while the writer works on the next one.

    The writer is never further ahead: meanwhile more commands come, and go into fewer transactions.

    Args:
        sync: Returns when everything that was committed before the call is on disk.
        on_error: Called with what `sync` raised; must not return.
    """

    def __init__(self, sync: Callable[[], None], on_error: Callable[[Exception], NoReturn]) -> None:
        self._sync = sync
        self._on_error = on_error
        self._next: Callable[[], None] | None = None
        self._changed = threading.Condition(threading.Lock())
        self._busy = False
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="store-sync", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Does what is left, then ends the thread. The writer must have ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def settle(self, answer: Callable[[], None], *, at_once: bool) -> None:
        """Calls back when what was committed is on disk; returns when all that was settled before is.

        Args:
            answer: Called in this thread, which is the writer's, or the syncer's.
            at_once: Whether the writer has nothing else to do: it then syncs by itself if it can, which saves
                the way to another thread.
        """
        with self._changed:
            if self._busy or not at_once:
                self._next = answer
                self._changed.notify_all()
                while self._next is not None:
                    self._changed.wait()
                return
        self._finish(answer)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                while self._next is None:
                    if self._stopping:
                        return
                    self._changed.wait()
                self._busy = True
                answer, self._next = self._next, None
                self._changed.notify_all()
            self._finish(answer)

    def _finish(self, answer: Callable[[], None]) -> None:
        try:
            self._sync()
        except Exception as error:  # whatever it is, nobody may be answered
            self._on_error(error)
        answer()
