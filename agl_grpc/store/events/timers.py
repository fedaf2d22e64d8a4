"""R7: one scheduler for everything that happens by itself. It sleeps until the earliest moment armed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agl_grpc.store.clock import SECOND, Clock
from agl_grpc.store.errors import StoreError
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.storage.writer import Writer

FIRE_LIMIT = 200
"""Most due entries that a sweep handles in one transaction."""

_RETRY = 1 * SECOND
_log = logging.getLogger(__name__)

Sweep = Callable[[Tx], None]
NextDue = Callable[[Connection], int | None]


class Timers:
    """Runs the registered sweeps when the earliest armed moment comes.

    A sweep handles up to FIRE_LIMIT entries that are due and arms the moment of the next one (now,
    if some are left). It runs as a command, so what it does is one transaction with its events.
    """

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        self._sweeps: list[Sweep] = []
        self._dues: list[NextDue] = []
        self._due: int | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    def register(self, sweep: Sweep, next_due: NextDue) -> None:
        """Adds a sweep, and what reads when it next has something to do."""
        self._sweeps.append(sweep)
        self._dues.append(next_due)

    def next_due(self, db: Connection) -> int | None:
        """When the next sweep has something to do; None = nothing waits for its time."""
        moments = [moment for read in self._dues if (moment := read(db)) is not None]
        return min(moments, default=None)

    def arm(self, due: int | None) -> None:
        """Looks no later than this moment (microseconds)."""
        if due is None or self._closed or (self._due is not None and self._due <= due):
            return
        self._due = due
        if self._handle is not None:
            self._handle.cancel()
        delay = max(0, due - self._clock.now()) / SECOND
        self._handle = asyncio.get_running_loop().call_later(delay, self._start)

    def _start(self) -> None:
        self._handle = None
        self._due = None
        if self._running is not None and not self._running.done():
            # One sweep at a time; it looks again when it is done.
            self._running.add_done_callback(lambda _: self.arm(self._clock.now()))
            return
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.fire()
        except StoreError as error:
            _log.warning("timers could not run, trying again: %s", error)
            self.arm(self._clock.now() + _RETRY)

    async def fire(self) -> None:
        """Runs every sweep now."""
        await self._writer.submit(self._sweep_all, rows=FIRE_LIMIT)

    def _sweep_all(self, tx: Tx) -> None:
        for sweep in self._sweeps:
            sweep(tx)

    async def close(self) -> None:
        """Fires no more."""
        self._closed = True
        if self._handle is not None:
            self._handle.cancel()
        if self._running is not None:
            await asyncio.wait([self._running])
