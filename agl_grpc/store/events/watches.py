"""Watches: the event log read from a cursor, page by page, so that memory never grows (R23)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from google.protobuf.message import Message

from agl_grpc.store.errors import cursor_compacted, draining, invalid_field
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import oldest_position, position
from agl_grpc.store.store import Store

T = TypeVar("T", bound=Message)
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
class Found(Generic[T]):
    """What a page of the log came to: something to send (None = nothing of interest) and the new cursor."""

    answer: T | None
    cursor: int


class LogWatch(Generic[T]):
    """Follows one kind of entity.

    Args:
        store: The store.
        entity: The EntityKind.
        run_key: Only this run; None = all.
        build: Turns entries into something to send, in a read transaction; None = nothing of interest.
    """

    def __init__(
        self,
        store: Store,
        entity: int,
        run_key: int | None,
        build: Callable[[Connection, list[LogEntry]], T | None],
    ) -> None:
        self._store = store
        self._entity = entity
        self._run_key = run_key
        self._build = build

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

    async def follow(self, cursor: int) -> AsyncIterator[Found[T]]:
        """Everything after the cursor, for ever; where nothing of interest came for a while, a checkpoint."""
        waiter = self._store.hub.add(
            [self._entity], run_keys=None if self._run_key is None else [self._run_key]
        )
        told = time.monotonic()
        try:
            while not self._store.hub.closed:
                found, more = await self._store.read(partial(self._page, cursor))
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

    def _page(self, after: int, db: Connection) -> tuple[Found[T], bool]:
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
        cursor = entries[-1].position if more else end
        return Found(answer, max(cursor, after)), more
