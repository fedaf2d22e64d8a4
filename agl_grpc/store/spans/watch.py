"""WatchSpans: the log's entries about spans, followed from a cursor in messages of bounded size (R23)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from functools import partial

from agl_grpc.store import errors
from agl_grpc.store.events.watches import CHECKPOINT_SECONDS
from agl_grpc.store.spans.check import MODEL_CALL
from agl_grpc.store.spans.read import Answer, SpanReader, rows_where
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import oldest_position, position
from agl_grpc.store.store import Store
from agl_grpc.v1 import event_pb2, store_service_pb2

_ENTRIES = 200
_SPANS = 1000
_BYTES = 256 << 10
_SPANS_ENTITY = int(event_pb2.ENTITY_KIND_SPANS)


class SpanWatch:
    """One watch of spans.

    Args:
        store: Where they are.
        run_key: Only of this run; None = all.
        rollout_ids: Only of these; empty = all.
        model_calls_only: Only spans with a model call.
    """

    def __init__(
        self, store: Store, run_key: int | None, rollout_ids: Collection[str], *, model_calls_only: bool
    ) -> None:
        self._store = store
        self._run_key = run_key
        self._rollout_ids = frozenset(rollout_ids)
        self._flags = MODEL_CALL if model_calls_only else 0

    async def follow(self, cursor: int) -> AsyncIterator[bytes]:
        """Serialised WatchSpansResponses, for ever.

        Raises:
            StoreError: CURSOR_COMPACTED, and DRAINING when the server goes.
        """
        place = await self._store.read(lambda db: _start(db, cursor))
        yield _checkpoint(place)
        waiter = self._store.hub.add(
            [_SPANS_ENTITY], run_keys=None if self._run_key is None else [self._run_key]
        )
        told = time.monotonic()
        try:
            while not self._store.hub.closed:
                answer, place, more = await self._store.read(partial(self._page, at=place))
                quiet = told + CHECKPOINT_SECONDS - time.monotonic()
                if answer is not None or quiet <= 0:
                    yield answer or _checkpoint(place)
                    told, quiet = time.monotonic(), CHECKPOINT_SECONDS
                if not more:
                    await waiter.wait(quiet)
            raise errors.draining()
        finally:
            self._store.hub.remove(waiter)

    def _page(self, db: Connection, at: int) -> tuple[bytes | None, int, bool]:
        """The next message (None = nothing of interest), how far it goes, and whether there is more."""
        if at < oldest_position(db) - 1:
            raise errors.cursor_compacted(oldest_position(db))
        scope = "" if self._run_key is None else f"AND run_key = {self._run_key} "
        end = position(db)
        entries = db.execute(
            "SELECT position, ref, low, high FROM events WHERE position > ? AND entity = ? "
            f"{scope}ORDER BY position LIMIT {_ENTRIES}",
            (at, _SPANS_ENTITY),
        ).fetchall()
        answer, reader = Answer(), SpanReader(db)
        more = len(entries) == _ENTRIES
        for entry, attempt_key, low, high in entries:
            # Whole entries only, which the writer keeps small: a cursor is never within one.
            if answer.size > _BYTES or answer.count > _SPANS:
                more = True
                break
            for row in rows_where(
                db,
                "WHERE s.attempt_key = ? AND s.span_key BETWEEN ? AND ? AND s.flags & ? = ? "
                "ORDER BY s.span_key",
                (attempt_key, low, high, self._flags, self._flags),
            ):
                if not self._rollout_ids or row.rollout_id in self._rollout_ids:
                    answer.add(reader.stored(row))
            at = entry
        at = at if more else max(end, at)
        rest = store_service_pb2.WatchSpansResponse(cursor=at)
        return answer.serialise(rest) if answer.count else None, at, more


def _checkpoint(cursor: int) -> bytes:
    """A message that says only where the watch stands."""
    return store_service_pb2.WatchSpansResponse(cursor=cursor, checkpoint=True).SerializeToString()


def _start(db: Connection, cursor: int) -> int:
    """The position to begin after; 0 = from now on."""
    if cursor < 0:
        raise errors.invalid_field("cursor", "must not be negative")
    newest, oldest = position(db), oldest_position(db)
    if cursor == 0:
        return newest
    if cursor > newest or cursor < oldest - 1:
        raise errors.cursor_compacted(oldest)
    return cursor
