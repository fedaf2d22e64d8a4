"""WatchRollouts and WatchAttempts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from agl_grpc.store.door.call import Call
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.events.watches import MESSAGE_BYTES, LogEntry, LogWatch
from agl_grpc.store.rollouts.attempts import ATTEMPT, ROLLOUT
from agl_grpc.store.rollouts.encode import load_attempts, load_listed
from agl_grpc.store.rollouts.filters import condition_of, run_key_of
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key, marks
from agl_grpc.v1 import event_pb2, rollout_pb2, store_service_pb2

_DELETED = int(event_pb2.EVENT_KIND_DELETED)
_PAGE = 200
_NAMED = (
    "SELECT a.attempt_key, r.rollout_id FROM attempts a JOIN rollouts r ON r.rollout_key = a.rollout_key "
    "WHERE a.attempt_key IN ({keys})"
)
Answer = store_service_pb2.WatchRolloutsResponse


class WatchHandlers:
    """Serves the watches of rollouts and attempts."""

    def __init__(self, side: WriteSide) -> None:
        self._store = side.store

    async def watch_rollouts(
        self, request: store_service_pb2.WatchRolloutsRequest, call: Call
    ) -> AsyncIterator[Answer | bytes]:
        """Rollouts as they change."""
        call.caller.require_run(request.filter.run_id)
        if request.include_existing and request.cursor:
            raise invalid_field("cursor", "must be 0 with include_existing")
        run_key = await self._store.read(lambda db: run_key_of(db, request.filter.run_id))

        def build(db: Connection, entries: list[LogEntry]) -> Answer | None:
            answer = _changed(db, request.filter, entries, with_attempts=request.include_attempts)
            return answer if answer.rollouts or answer.deleted_rollout_ids else None

        shared = (request.filter.SerializeToString(deterministic=True), request.include_attempts)
        watch = LogWatch(self._store, ROLLOUT, run_key, build, shared)
        cursor = await watch.start(request.cursor)
        if request.include_existing:
            async for page in self._existing(request):
                yield page
        yield Answer(cursor=cursor, checkpoint=True)
        async for found in watch.follow(cursor):
            yield found.answer or Answer(checkpoint=True, cursor=found.cursor)

    async def _existing(self, request: store_service_pb2.WatchRolloutsRequest) -> AsyncIterator[Answer]:
        after = 0
        while True:
            keys = await self._store.read(partial(_matching, request.filter, after))
            if not keys:
                return
            answer, after = await self._store.read(partial(_page, request, keys))
            if answer.rollouts:
                yield answer

    async def watch_attempts(
        self, request: store_service_pb2.WatchAttemptsRequest, _call: Call
    ) -> AsyncIterator[store_service_pb2.WatchAttemptsResponse | bytes]:
        """Attempts as they change."""
        run_key = await self._store.read(lambda db: run_key_of(db, request.run_id))
        wanted = frozenset(request.rollout_ids)

        def build(db: Connection, entries: list[LogEntry]) -> store_service_pb2.WatchAttemptsResponse | None:
            answer = store_service_pb2.WatchAttemptsResponse()
            keys = list(dict.fromkeys(entry.ref for entry in entries))
            if wanted:
                named = by_key(db, _NAMED, keys)
                keys = [key for key, (_, rollout_id) in named.items() if rollout_id in wanted]
            # What is too large is built anew of fewer entries: one attempt always fits.
            answer.attempts.extend(load_attempts(db, keys, most_bytes=MESSAGE_BYTES))
            return answer if answer.attempts else None

        watch = LogWatch(self._store, ATTEMPT, run_key, build, shared=wanted)
        cursor = await watch.start(request.cursor)
        yield store_service_pb2.WatchAttemptsResponse(cursor=cursor, checkpoint=True)
        async for found in watch.follow(cursor):
            yield found.answer or store_service_pb2.WatchAttemptsResponse(
                checkpoint=True, cursor=found.cursor
            )


def _changed(
    db: Connection,
    chosen: rollout_pb2.RolloutFilter,
    entries: list[LogEntry],
    *,
    with_attempts: bool,
) -> Answer:
    gone = {entry.ref: entry.entity_id for entry in entries if entry.kind == _DELETED}
    keys = [key for key in dict.fromkeys(entry.ref for entry in entries) if key not in gone]
    return Answer(
        # What is too large is built anew of fewer entries: one rollout always fits.
        rollouts=load_listed(
            db, _still(db, chosen, keys), with_attempts=with_attempts, most_bytes=MESSAGE_BYTES
        ),
        deleted_rollout_ids=[rollout_id for rollout_id in gone.values() if rollout_id],
    )


def _page(
    request: store_service_pb2.WatchRolloutsRequest, keys: list[int], db: Connection
) -> tuple[Answer, int]:
    """Rollouts as one message, and the last key that it covers: a page ends early when they are large."""
    still = _still(db, request.filter, keys)
    shown = load_listed(db, still, with_attempts=request.include_attempts, most_bytes=MESSAGE_BYTES)
    last = keys[-1] if len(shown) == len(still) else still[len(shown) - 1]
    return Answer(rollouts=shown), last


def _still(db: Connection, chosen: rollout_pb2.RolloutFilter, keys: list[int]) -> list[int]:
    """Those of the rollouts that exist and match, in the order given."""
    where = condition_of(db, chosen)
    found = {
        key
        for (key,) in db.execute(
            f"SELECT r.rollout_key FROM rollouts r WHERE r.rollout_key IN ({marks(len(keys))}) "
            f"AND {where.sql}",
            [*keys, *where.values],
        )
    }
    return [key for key in keys if key in found]


def _matching(chosen: rollout_pb2.RolloutFilter, after: int, db: Connection) -> list[int]:
    where = condition_of(db, chosen)
    rows = db.execute(
        f"SELECT r.rollout_key FROM rollouts r WHERE r.rollout_key > ? AND {where.sql} "
        "ORDER BY r.rollout_key LIMIT ?",
        [after, *where.values, _PAGE],
    )
    return [key for (key,) in rows]
