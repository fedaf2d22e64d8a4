"""ListSpans, ExportSpans, WatchSpans."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial

from agl_grpc.store import errors, limits
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import check_size, seal, unseal
from agl_grpc.store.handlers.common import require_runs_of
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.rows import attempt_by_name, refuse_evicted, rollout_by_id
from agl_grpc.store.spans.check import MODEL_CALL
from agl_grpc.store.spans.read import Answer, SpanReader, rows_by_key, rows_where
from agl_grpc.store.spans.select import COLUMNS, scan, sort_name
from agl_grpc.store.spans.watch import SpanWatch
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks
from agl_grpc.store.store import Store
from agl_grpc.v1 import common_pb2, store_service_pb2

DEFAULT_PAGE = 1000
ANSWER_BYTES = 24 << 20
"""A page ends early when its spans have so many bytes: a message holds 64 MiB, a span up to 4."""

_EXPORT = b"export"
_EXPORT_PAGE = 500
_EXPORT_BYTES = 4 << 20


class SpanReadHandlers:
    """Serves the reading rpcs of spans.

    Args:
        store: Where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list_spans(self, request: store_service_pb2.ListSpansRequest, call: Call) -> bytes:
        """One page of a rollout's spans."""
        query = _Query(request)

        def read(db: Connection) -> bytes:
            require_runs_of(db, call, [request.rollout_id])
            return query.answer(db)

        return await self._store.read(read)

    async def export_spans(
        self, request: store_service_pb2.ExportSpansRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Spans of many rollouts, oldest first, up to the moment of the call."""
        call.caller.require_run(request.run_id)
        last, newest = await self._store.read(partial(_begin, cursor=request.cursor))
        while not call.drain.is_set():
            page, last = await self._store.read(
                partial(_export_page, request=request, last=last, newest=newest)
            )
            if page is None:
                return
            yield page
        raise errors.draining()

    async def watch_spans(
        self, request: store_service_pb2.WatchSpansRequest, _call: Call
    ) -> AsyncIterator[bytes]:
        """Spans as they arrive."""
        run_key = await self._store.read(lambda db: run_key_of(db, request.run_id))
        watch = SpanWatch(
            self._store, run_key, request.rollout_ids, model_calls_only=request.model_calls_only
        )
        async for answer in watch.follow(request.cursor):
            yield answer


class _Query:
    """One ListSpans call. Its page tokens name the last span of the page before: spans never change."""

    def __init__(self, request: store_service_pb2.ListSpansRequest) -> None:
        if not request.rollout_id:
            raise errors.invalid_field("rollout_id", "is required")
        if request.skip < 0:
            raise errors.invalid_field("skip", "must not be negative")
        self._request = request
        self._size = check_size(request.page_size, limits.SPAN_PAGE_SIZE, DEFAULT_PAGE)
        self._order = sort_name(request.order_by)
        self._descending = request.order == common_pb2.SORT_ORDER_DESCENDING
        scope = store_service_pb2.ListSpansRequest()
        scope.CopyFrom(request)
        for name in ("page_size", "page_token", "skip", "include_total", "omit_tokens"):
            scope.ClearField(name)
        self._scope = b"spans" + scope.SerializeToString(deterministic=True)

    def answer(self, db: Connection) -> bytes:
        """The page as a serialised ListSpansResponse."""
        request = self._request
        attempt_keys = _attempt_keys(db, request.rollout_id, request.attempt_id)
        refuse_evicted(db, attempt_keys)
        simple = not request.filter.ByteSize() and self._order in COLUMNS
        keys = (self._by_database if simple else self._by_scan)(db, attempt_keys)
        rows = rows_by_key(db, keys[: self._size])
        reader = SpanReader(db, omit_tokens=request.omit_tokens)
        answer, rest = Answer(), store_service_pb2.ListSpansResponse()
        for row in rows:
            stored = reader.stored(row)
            if answer.count and answer.size + len(stored) > ANSWER_BYTES:
                break
            answer.add(stored)
        if answer.count < len(keys):
            rest.next_page_token = seal(db, self._scope, [rows[answer.count - 1].span_key])
        if request.include_total:
            rest.total_size = self._total(db, attempt_keys)
        return answer.serialise(rest)

    def _by_database(self, db: Connection, attempt_keys: Sequence[int]) -> list[int]:
        """One key more than a page holds, if there are so many."""
        column = COLUMNS[self._order]
        where = f"attempt_key IN ({marks(len(attempt_keys))})"
        values: list[int] = list(attempt_keys)
        if self._request.page_token:
            last = self._last_key(db)
            where += f" AND ({column}, span_key) {'<' if self._descending else '>'} "
            where += f"((SELECT {column} FROM spans WHERE span_key = ?), ?)"
            values += [last, last]
        way = "DESC" if self._descending else "ASC"
        rows = db.execute(
            f"SELECT span_key FROM spans WHERE {where} ORDER BY {column} {way}, span_key {way} "
            "LIMIT ? OFFSET ?",
            [*values, self._size + 1, 0 if self._request.page_token else self._request.skip],
        )
        return [key for (key,) in rows]

    def _by_scan(self, db: Connection, attempt_keys: Sequence[int]) -> list[int]:
        keys = scan(db, attempt_keys, self._request.filter, self._order, self._descending)
        if not self._request.page_token:
            return keys[self._request.skip :][: self._size + 1]
        try:
            start = keys.index(self._last_key(db)) + 1
        except ValueError as error:
            raise errors.page_token_invalid() from error
        return keys[start : start + self._size + 1]

    def _total(self, db: Connection, attempt_keys: Sequence[int]) -> int:
        if self._request.filter.ByteSize():
            return len(scan(db, attempt_keys, self._request.filter, "sequence_id", descending=False))
        (total,) = db.execute(
            f"SELECT count(*) FROM spans WHERE attempt_key IN ({marks(len(attempt_keys))})",
            list(attempt_keys),
        ).fetchone()
        return int(total)

    def _last_key(self, db: Connection) -> int:
        (last,) = unseal(db, self._scope, self._request.page_token)
        return int(last)


def _attempt_keys(db: Connection, rollout_id: str, attempt_id: str) -> list[int]:
    """The attempts that a query means: one, the latest, or all of the rollout."""
    rollout = rollout_by_id(db, rollout_id)
    if not attempt_id:
        rows = db.execute("SELECT attempt_key FROM attempts WHERE rollout_key = ?", (rollout.key,))
        return [key for (key,) in rows]
    if attempt_id == "latest":
        return [rollout.latest_attempt_key] if rollout.latest_attempt_key is not None else []
    return [attempt_by_name(db, rollout_id, attempt_id).key]


def _begin(db: Connection, cursor: str) -> tuple[int, int]:
    """The span after which an export goes on, and the one with which it ends."""
    (newest,) = db.execute("SELECT coalesce(max(span_key), 0) FROM spans").fetchone()
    last = unseal(db, _EXPORT, cursor, "cursor")[0] if cursor else 0
    return int(last), int(newest)


def _export_page(
    db: Connection, request: store_service_pb2.ExportSpansRequest, last: int, newest: int
) -> tuple[bytes | None, int]:
    """The next page of an export and its cursor; None = the end."""
    where = ["s.span_key > ?", "s.span_key <= ?"]
    values: list[object] = [last, newest]
    run_key = run_key_of(db, request.run_id)
    if run_key is not None:
        where.append("a.run_key = ?")
        values.append(run_key)
    if request.rollout_ids:
        where.append(f"r.rollout_id IN ({marks(len(request.rollout_ids))})")
        values += request.rollout_ids
    if request.model_calls_only:
        where.append(f"s.flags & {MODEL_CALL} <> 0")
    if request.sealed_only:
        where.append("a.sealed = 1")
    rows = rows_where(db, f"WHERE {' AND '.join(where)} ORDER BY s.span_key LIMIT {_EXPORT_PAGE}", values)
    if not rows:
        return None, last
    reader = SpanReader(db, whole=not request.delta_prompts)
    answer = Answer()
    for row in rows:
        answer.add(reader.stored(row))
        last = row.span_key
        if answer.size > _EXPORT_BYTES:
            break
    cursor = seal(db, _EXPORT, [last])
    return answer.serialise(store_service_pb2.ExportSpansResponse(cursor=cursor)), last
