"""Background housekeeping: request ids after 24 hours, the event log's old end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import StoreError
from agl_grpc.store.storage import idempotency
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.storage.writer import Writer

KEEP_EVENTS = 24 * 3600 * SECOND
_PERIOD_SECONDS = 30.0
_STEP = 500
_log = logging.getLogger(__name__)

Prune = Callable[[Tx, int], int]


def prune_events(tx: Tx, limit: int = _STEP) -> int:
    """Forgets log entries older than 24 hours, never the newest one (it holds the position).

    Returns:
        How many were forgotten; `limit` = there may be more.
    """
    cursor = tx.execute(
        "DELETE FROM events WHERE position IN (SELECT position FROM "
        "(SELECT position, time FROM events ORDER BY position LIMIT ?) AS oldest WHERE time < ?) "
        "AND position < (SELECT max(position) FROM events)",
        (limit, tx.now - KEEP_EVENTS),
    )
    return cursor.rowcount


class Maintenance:
    """Runs prunes in small steps, as commands of the slow lane."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._prunes: list[Prune] = [idempotency.prune, prune_events]
        self._task: asyncio.Task[None] | None = None

    def register(self, prune: Prune) -> None:
        """Adds a prune: deletes at most `limit` rows and returns how many."""
        self._prunes.append(prune)

    def start(self) -> None:
        """Begins on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                await self.run_once()
            except StoreError as error:
                _log.warning("housekeeping waits: %s", error)
            await asyncio.sleep(_PERIOD_SECONDS)

    async def run_once(self) -> int:
        """Runs every prune until nothing is left; returns how many rows went."""
        return sum([await self.exhaust(prune) for prune in self._prunes])

    async def exhaust(self, prune: Prune) -> int:
        """Runs one prune until nothing is left; returns how many rows went."""
        total = 0
        while True:
            count = await self._writer.submit(lambda tx: prune(tx, _STEP), Lane.SPANS, _STEP)
            total += count
            if count < _STEP:
                return total

    async def close(self) -> None:
        """Stops."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
