"""Watches: the event log read from a cursor, page by page, so that memory never grows (R23)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from agl_grpc.store.errors import cursor_compacted, draining, invalid_field
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import oldest_position, position
from agl_grpc.store.store import Store

PAGE = 500
"""Most log entries that are read at once."""

MESSAGE_BYTES = 256 << 10
"""Most bytes of one message, unless a single entry needs more: a watcher that does not read costs no more."""

CHECKPOINT_SECONDS = 10.0
"""A watch to which nothing of interest comes says so often that it is alive and where it stands."""


@dataclass(frozen=True)
class LogEntry:
    """What a watch sees of a log entry."""

    position: int
    kind: int
    ref: int
    low: int
    high: int
    entity_id: str | None


@dataclass(frozen=True)
class Found:
    """What a page of the log came to: something to send (None = nothing of interest) and the new cursor."""

    answer: bytes | None
    cursor: int


class Watched(Protocol):
    """A message about changes; every watch has one with these."""

    cursor: int

    def ByteSize(self) -> int: ...

    def SerializeToString(self) -> bytes: ...


class LogWatch:
    """Follows one kind of entity.

    Args:
        store: The store.
        entity: The EntityKind.
        run_key: Only this run; None = all.
        build: Turns entries into something to send, in a read transaction; None = nothing of interest.
        shared: What `build` depends on beside the run, when others may watch the same; None = it is alone.
    """

    def __init__(
        self,
        store: Store,
        entity: int,
        run_key: int | None,
        build: Callable[[Connection, list[LogEntry]], Watched | None],
        shared: Hashable = None,
    ) -> None:
        self._store = store
        self._entity = entity
        self._run_key = run_key
        self._build = build
        self._shared = None if shared is None else (entity, run_key, shared)

    async def start(self, cursor: int) -> int:
        """The position to begin after; 0 = from now on.

        Raises:
            StoreError: CURSOR_COMPACTED when the log no longer (or not yet) reaches there.
        """
        if cursor < 0:
            raise invalid_field("cursor", "must not be negative")
        newest, oldest = await self._store.read(lambda db: (position(db), oldest_position(db)))
        if cursor == 0:
            return newest
        if cursor > newest or cursor < oldest - 1:
            raise cursor_compacted(oldest)
        return cursor

    async def follow(self, cursor: int) -> AsyncIterator[Found]:
        """Everything after the cursor, for ever; where nothing of interest came for a while, a checkpoint."""
        waiter = self._store.hub.add(
            [self._entity], run_keys=None if self._run_key is None else [self._run_key]
        )
        told = time.monotonic()
        try:
            while not self._store.hub.closed:
                found, more = await self._read(cursor)
                cursor = found.cursor
                quiet = told + CHECKPOINT_SECONDS - time.monotonic()
                if found.answer is not None or quiet <= 0:
                    yield found
                    told, quiet = time.monotonic(), CHECKPOINT_SECONDS
                if not more:
                    # A wake-up is a hint only: correctness rests on looking again.
                    await waiter.wait(quiet)
            # An error, so that the caller knows that the watch did not end by itself.
            raise draining()
        finally:
            self._store.hub.remove(waiter)

    async def _read(self, after: int) -> tuple[Found, bool]:
        page = partial(self._page, after)
        if self._shared is None:
            return await self._store.read(page)
        return await self._store.read_shared((self._shared, after), page)

    def _page(self, after: int, db: Connection) -> tuple[Found, bool]:
        oldest = oldest_position(db)
        if after < oldest - 1:
            raise cursor_compacted(oldest)
        end = position(db)
        scope = "" if self._run_key is None else f"AND run_key = {self._run_key} "
        entries = [
            LogEntry(*row)
            for row in db.execute(
                "SELECT position, kind, ref, low, high, entity_id FROM events WHERE position > ? "
                "AND entity = ? "
                f"{scope}ORDER BY position LIMIT ?",
                (after, self._entity, PAGE),
            )
        ]
        more = len(entries) == PAGE
        answer = self._build(db, entries) if entries else None
        while answer is not None and len(entries) > 1 and answer.ByteSize() > MESSAGE_BYTES:
            entries, more = entries[: len(entries) // 2], True
            answer = self._build(db, entries)
        cursor = max(entries[-1].position if more else end, after)
        if answer is None:
            return Found(None, cursor), more
        answer.cursor = cursor
        return Found(answer.SerializeToString(), cursor), more
