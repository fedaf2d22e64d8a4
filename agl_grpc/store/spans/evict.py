"""Throw-away stores give up old spans before they grow too large (R24): whole attempts, oldest first."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agl_grpc.store.errors import StoreError, overloaded
from agl_grpc.store.rollouts.attempts import ATTEMPT, UPDATED
from agl_grpc.store.spans.write import delete_spans
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store

_STEP = 100
_LOOK_AGAIN_SECONDS = 1.0
_log = logging.getLogger(__name__)

PinHook = Callable[[Tx, int], bool]


@dataclass(frozen=True)
class EvictionLimits:
    """When a throw-away store gives spans up; all in bytes of spans.

    Attributes:
        above: Eviction begins above it.
        down_to: Eviction goes on until there are no more than so many.
        capacity: What the machine has: memory, or room in the folder for temporary files if that is less.
    """

    above: int
    down_to: int
    capacity: int

    @classmethod
    def choose(cls, above: int | None = None, down_to: int | None = None) -> EvictionLimits:
        """Limits as given, else 70 % of what the machine has and 80 % of that.

        Raises:
            ValueError: They do not fit each other.
        """
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        capacity = min(memory, shutil.disk_usage(tempfile.gettempdir()).free)
        above = capacity * 7 // 10 if above is None else above
        down_to = above * 8 // 10 if down_to is None else down_to
        if not 0 <= down_to <= above or above <= 0:
            raise ValueError(f"spans cannot be evicted above {above} bytes down to {down_to} bytes")
        return cls(above, down_to, capacity)


class Evictor:
    """Watches how many bytes of spans there are and evicts when they are too many.

    Spans of live, unsealed, claimed and pinned attempts stay. When only those are left, `admit` refuses
    more until something can go.

    Args:
        store: The store.
        limits: When.
        is_pinned: Whether a rollout's key must keep its spans.
    """

    def __init__(self, store: Store, limits: EvictionLimits, is_pinned: Sequence[PinHook]) -> None:
        self.limits = limits
        self._store = store
        self._is_pinned = is_pinned
        self._bytes = 0
        self._full = False
        self._last_key = 0
        self._passes = -1  # through all attempts, in the eviction that is under way; -1 = none is
        self._task: asyncio.Task[None] | None = None

    def admit(self) -> None:
        """Lets more spans in.

        Raises:
            StoreError: OVERLOADED while the store is full of spans that must stay.
        """
        if self._full:
            self._start()
            raise overloaded("span_bytes", _LOOK_AGAIN_SECONDS)

    def added(self, size: int) -> None:
        """So many bytes of spans came in."""
        self._bytes += size
        if self._bytes > self.limits.above:
            self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while await self._store.write(self._step, Lane.LIFECYCLE, _STEP):
                pass
        except StoreError as error:
            _log.warning("spans could not be evicted, trying again with the next ones: %s", error)
            return
        if self._full:
            _log.warning("the store is full: its %d bytes of spans must all stay", self._bytes)
            # Whoever waits asks again by then; only then is it worth another look.
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    def _step(self, tx: Tx) -> bool:
        """Evicts some attempts; returns whether to go on. Writer's thread."""
        (total,) = tx.execute("SELECT coalesce(sum(bytes), 0) FROM span_totals").fetchone()
        if self._passes < 0:
            if total <= self.limits.above:
                self._bytes, self._full = int(total), False
                return False
            self._passes = 0
        rows = tx.execute(
            "SELECT a.attempt_key, a.rollout_key, a.run_key FROM attempts a WHERE a.attempt_key > ? AND "
            "a.sealed = 1 AND EXISTS (SELECT 1 FROM spans s WHERE s.attempt_key = a.attempt_key) "
            "ORDER BY a.attempt_key LIMIT ?",
            (self._last_key, _STEP),
        ).fetchall()
        for key, rollout_key, run_key in rows:
            if total <= self.limits.down_to:
                break
            self._last_key = key
            if not any(pinned(tx, rollout_key) for pinned in self._is_pinned):
                total -= self._evict(tx, key, run_key)
        if len(rows) < _STEP:
            # The oldest come again: the first pass may have begun anywhere, the second sees all.
            self._last_key, self._passes = 0, self._passes + 1
        if total > self.limits.down_to and self._passes < 2:
            return True
        self._bytes, self._full, self._passes = int(total), total > self.limits.above, -1
        return False

    def _evict(self, tx: Tx, attempt_key: int, run_key: int) -> int:
        tx.execute("UPDATE attempts SET spans_evicted = 1 WHERE attempt_key = ?", (attempt_key,))
        tx.event(run_key, ATTEMPT, UPDATED, attempt_key)
        return delete_spans(tx, attempt_key, run_key)

    async def close(self) -> None:
        """Evicts no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
