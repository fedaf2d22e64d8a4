"""Rollouts: start, enqueue, dequeue, get, list, change, cancel, try again, delete, wait."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from agl_grpc.store import limits
from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import PageRequest, check_size, fetch_page, order_of
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.events.waits import Wait
from agl_grpc.store.handlers.common import change, mask_paths, request_key, require_runs_of
from agl_grpc.store.rollouts import workers
from agl_grpc.store.rollouts.deletion import STEP, Deleted
from agl_grpc.store.rollouts.dispatch import within
from agl_grpc.store.rollouts.encode import (
    attempted_message,
    duration_of,
    fit,
    load_attempted,
    load_listed,
    select_rollouts,
)
from agl_grpc.store.rollouts.filters import condition_of
from agl_grpc.store.rollouts.lifecycle import CANCELLED, FAILED, SUCCEEDED
from agl_grpc.store.rollouts.rows import RolloutRow, rollouts_where
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage import idempotency
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.sql import LAST_TEXT
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import rollout_pb2, store_service_pb2

T = TypeVar("T")

_TERMINAL = f"r.status IN ({SUCCEEDED}, {FAILED}, {CANCELLED})"
_COLUMNS = {
    "create_time": "r.create_time",
    "start_time": "r.create_time",
    "end_time": "coalesce(r.end_time, 9223372036854775807)",
    "rollout_id": "r.rollout_id",
    "status": "r.status",
    "priority": "r.priority",
    "mode": "CASE r.mode WHEN 0 THEN 9223372036854775807 ELSE r.mode END",
    "resources_id": "coalesce((SELECT s.resources_id FROM resources s WHERE s.resource_key = "
    f"r.resource_key), {LAST_TEXT})",
}


class RolloutHandlers:
    """Serves the methods about rollouts."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store

    async def start_rollout(self, request: store_service_pb2.StartRolloutRequest, call: Call) -> bytes:
        """A rollout with its first attempt, without queue and lease."""

        def run(tx: Tx) -> store_service_pb2.StartRolloutResponse:
            row = self._side.rollouts.start(tx, self._side.catalog.run(tx, request.run_id), request.rollout)
            attempted, credential = self._begin(tx, row, request.worker_id)
            return store_service_pb2.StartRolloutResponse(rollout=attempted, attempt_credential=credential)

        return await change(self._store, call, request, run, 6)

    async def start_attempt(self, request: store_service_pb2.StartAttemptRequest, call: Call) -> bytes:
        """A further attempt, without a lease."""

        def run(tx: Tx) -> store_service_pb2.StartAttemptResponse:
            row = self._side.rollouts.require(tx, request.rollout_id)
            attempted, credential = self._begin(tx, row, request.worker_id)
            return store_service_pb2.StartAttemptResponse(rollout=attempted, attempt_credential=credential)

        return await change(self._store, call, request, run, 4)

    def _begin(self, tx: Tx, row: RolloutRow, worker_id: str) -> tuple[rollout_pb2.AttemptedRollout, str]:
        begun = self._side.moves.begin(tx, row, self._side.catalog.worker(tx, worker_id))
        credential = self._side.moves.credential(tx, row, begun.attempt_id)
        return load_attempted(tx.connection, row.key, begun.key), credential

    async def enqueue_rollouts(self, request: store_service_pb2.EnqueueRolloutsRequest, call: Call) -> bytes:
        """Rollouts into their queues, all or none."""

        def run(tx: Tx) -> store_service_pb2.EnqueueRolloutsResponse:
            of_run = self._side.catalog.run(tx, request.run_id)
            made = self._side.rollouts.enqueue(tx, of_run, request.rollouts)
            fit(made)
            return store_service_pb2.EnqueueRolloutsResponse(rollouts=made)

        return await change(self._store, call, request, run, 4 * len(request.rollouts))

    async def dequeue_rollouts(self, request: store_service_pb2.DequeueRolloutsRequest, call: Call) -> bytes:
        """Waiting rollouts, taken without leases."""

        def run(tx: Tx) -> store_service_pb2.DequeueRolloutsResponse:
            catalog = self._side.catalog
            keys = catalog.queue_keys(tx, catalog.run(tx, request.run_id), request.queues)
            answer = store_service_pb2.DequeueRolloutsResponse()
            worker_key = catalog.worker(tx, request.worker_id)
            if worker_key is not None:
                workers.asks(tx, worker_key)
            # All are chosen before the first one changes.
            chosen = list(within(self._side.dispatcher.ready(tx, keys, None, request.limit or 1)))
            for ready in chosen:
                attempted, credential = self._begin(tx, ready.row, request.worker_id)
                answer.rollouts.add(rollout=attempted, attempt_credential=credential)
            return answer

        return await change(self._store, call, request, run, 4 * max(1, request.limit))

    async def get_rollout(
        self, request: store_service_pb2.GetRolloutRequest, call: Call
    ) -> store_service_pb2.GetRolloutResponse:
        """One rollout with its newest attempt."""

        def read(db: Connection) -> store_service_pb2.GetRolloutResponse:
            require_runs_of(db, call, [request.rollout_id])
            rows = select_rollouts(db, "WHERE r.rollout_id = ?", request.rollout_id)
            if not rows:
                raise not_found("rollout", request.rollout_id)
            return store_service_pb2.GetRolloutResponse(
                rollout=attempted_message(db, rows[0]), position=position(db)
            )

        return await self._store.read(read)

    async def list_rollouts(
        self, request: store_service_pb2.ListRolloutsRequest, call: Call
    ) -> store_service_pb2.ListRolloutsResponse:
        """Rollouts by filter."""
        call.caller.require_run(request.filter.run_id)
        wanted = PageRequest(
            check_size(request.page_size), request.page_token, request.skip, request.include_total
        )
        order = order_of(request.order_by, request.order, _COLUMNS, "r.rollout_key", "create_time")

        def read(db: Connection) -> store_service_pb2.ListRolloutsResponse:
            where = condition_of(db, request.filter)
            page = fetch_page(db, "rollouts r", where.sql, where.values, order, wanted)
            # A page ends early when its inputs are large.
            listed = load_listed(
                db, page.keys, with_attempts=request.include_attempts, most_bytes=limits.ANSWER_BYTES
            )
            return store_service_pb2.ListRolloutsResponse(
                rollouts=listed,
                next_page_token=page.token_after(len(listed)),
                position=position(db),
                total_size=page.total,
            )

        return await self._store.read(read)

    async def update_rollout(self, request: store_service_pb2.UpdateRolloutRequest, call: Call) -> bytes:
        """Changes fields of a rollout."""
        paths = mask_paths(request.update_mask)

        def run(tx: Tx) -> store_service_pb2.UpdateRolloutResponse:
            return store_service_pb2.UpdateRolloutResponse(
                rollout=self._side.rollouts.update(tx, request.rollout, paths)
            )

        return await change(self._store, call, request, run, 4)

    async def cancel_rollouts(self, request: store_service_pb2.CancelRolloutsRequest, call: Call) -> bytes:
        """Cancels rollouts; their workers are told at once."""
        answer = store_service_pb2.CancelRolloutsResponse()

        def some(tx: Tx, rows: list[RolloutRow]) -> tuple[list[str], int]:
            reason = request.reason or "cancelled by its owner"
            ids = [row.rollout_id for row in rows if self._side.rollouts.cancel(tx, row, reason)]
            return ids, rows[-1].key

        async for ids in self._in_steps(call, request, f"NOT {_TERMINAL}", some):
            answer.rollout_ids.extend(ids)
        return await change(self._store, call, request, lambda tx: answer)

    async def retry_rollouts(self, request: store_service_pb2.RetryRolloutsRequest, call: Call) -> bytes:
        """A new rollout for each chosen finished one, all or none."""
        expire_after = request.expire_after if request.HasField("expire_after") else None

        def run(tx: Tx) -> store_service_pb2.RetryRolloutsResponse:
            rows = self._chosen(tx, request.filter, _TERMINAL, 0, limits.BATCH_ITEMS + 1)
            if len(rows) > limits.BATCH_ITEMS:
                raise invalid_field("filter", f"matches more than {limits.BATCH_ITEMS} rollouts; narrow it")
            made = self._side.rollouts.retry(tx, rows, expire_after)
            fit(made)
            return store_service_pb2.RetryRolloutsResponse(rollouts=made)

        return await change(self._store, call, request, run, 100)

    async def delete_rollouts(self, request: store_service_pb2.DeleteRolloutsRequest, call: Call) -> bytes:
        """Deletes finished rollouts with all that belongs to them."""
        answer = store_service_pb2.DeleteRolloutsResponse()

        def some(tx: Tx, rows: list[RolloutRow]) -> tuple[Deleted, int]:
            done = self._side.deletion.delete(tx, rows, dry_run=request.dry_run)
            return done, done.last_key

        async for done in self._in_steps(call, request, "TRUE", some):
            answer.deleted += done.deleted
            answer.kept += done.kept
        return await change(self._store, call, request, lambda tx: answer)

    async def _in_steps(
        self,
        call: Call,
        request: store_service_pb2.CancelRolloutsRequest | store_service_pb2.DeleteRolloutsRequest,
        also: str,
        some: Callable[[Tx, list[RolloutRow]], tuple[T, int]],
    ) -> AsyncIterator[T]:
        """Works through the chosen rollouts in many transactions, so that others get their turn.

        A call that was answered before has nothing left to do; one that is repeated after a crash goes on.

        Args:
            call: The call.
            request: The request; its filter chooses.
            also: What must hold of the rollouts besides.
            some: Does some of them; returns what came of it and the last one that it looked at.
        """
        last = 0

        def step(tx: Tx) -> tuple[T, int] | None:
            rows = self._chosen(tx, request.filter, also, last, STEP)
            return some(tx, rows) if rows else None

        key = request_key(call, request)
        if await self._store.write(lambda tx: idempotency.find(tx, key)) is None:
            while (done := await self._store.write(step, rows=STEP)) is not None:
                last = done[1]
                yield done[0]

    def _chosen(
        self, tx: Tx, chosen: rollout_pb2.RolloutFilter, also: str, last: int, limit: int
    ) -> list[RolloutRow]:
        """Rollouts by filter, oldest first, after the one with the key `last`."""
        where = condition_of(tx.connection, chosen)
        return rollouts_where(
            tx.connection,
            f"r WHERE {where.sql} AND {also} AND r.rollout_key > ? ORDER BY r.rollout_key LIMIT ?",
            *(*where.values, last, limit),
        )

    async def wait_rollouts(
        self, request: store_service_pb2.WaitRolloutsRequest, call: Call
    ) -> store_service_pb2.WaitRolloutsResponse:
        """Long poll until rollouts or groups are finished or sealed."""
        wanted = limits.LONG_POLL_SECONDS
        if request.HasField("timeout"):
            wanted = min(max(0, duration_of(request.timeout)) / SECOND, wanted)
        wait = Wait(
            self._store,
            list(dict.fromkeys(request.rollout_ids)),
            request.run_id,
            list(request.group_ids),
            sealed=request.until == store_service_pb2.WAIT_UNTIL_SEALED,
            until_any=request.any,
        )
        return await wait.run(call.wait_limit(wanted))
