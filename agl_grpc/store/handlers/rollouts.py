"""Rollouts: start, enqueue, dequeue, get, list, change, cancel, try again, delete, wait."""

from __future__ import annotations

from functools import partial

from agl_grpc.store import limits
from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import PageRequest, check_size, fetch_page, order_of
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.events.waits import Wait
from agl_grpc.store.handlers.common import at_most, change, mask_paths, request_key
from agl_grpc.store.rollouts.deletion import STEP, Deleted
from agl_grpc.store.rollouts.encode import attempted_message, duration_of, load_attempted, select_rollouts
from agl_grpc.store.rollouts.filters import condition_of
from agl_grpc.store.rollouts.lifecycle import CANCELLED, FAILED, SUCCEEDED
from agl_grpc.store.rollouts.rows import RolloutRow, rollout_by_key, rollouts_where
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage import idempotency
from agl_grpc.store.storage.catalog import RunRow
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.sql import LAST_TEXT
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import rollout_pb2, store_service_pb2

_MOST_DEQUEUED = 1000
_TERMINAL = f"r.status IN ({SUCCEEDED}, {FAILED}, {CANCELLED})"
_COLUMNS = {
    "create_time": "r.create_time",
    "start_time": "r.create_time",
    "end_time": "coalesce(r.end_time, 9223372036854775807)",
    "rollout_id": "r.rollout_id",
    "status": "r.status",
    "priority": "r.priority",
    "mode": "r.mode",
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
        at_most(len(request.rollouts), limits.BATCH_ITEMS, "rollouts")

        def run(tx: Tx) -> store_service_pb2.EnqueueRolloutsResponse:
            of_run = self._side.catalog.run(tx, request.run_id)
            made = self._side.rollouts.enqueue(tx, of_run, request.rollouts)
            return store_service_pb2.EnqueueRolloutsResponse(rollouts=made)

        return await change(self._store, call, request, run, 4 * len(request.rollouts))

    async def dequeue_rollouts(self, request: store_service_pb2.DequeueRolloutsRequest, call: Call) -> bytes:
        """Waiting rollouts, taken without leases."""
        if not 0 <= request.limit <= _MOST_DEQUEUED:
            raise invalid_field("limit", f"must be between 0 (= 1) and {_MOST_DEQUEUED}")

        def run(tx: Tx) -> store_service_pb2.DequeueRolloutsResponse:
            catalog = self._side.catalog
            of_run: RunRow = catalog.run(tx, request.run_id)
            names = list(dict.fromkeys(request.queues)) or [""]
            keys = [catalog.queue(tx, of_run, name).queue_key for name in names]
            answer = store_service_pb2.DequeueRolloutsResponse()
            for ready in self._side.dispatcher.ready(tx, keys, None, request.limit or 1):
                attempted, credential = self._begin(tx, ready.row, request.worker_id)
                answer.rollouts.add(rollout=attempted, attempt_credential=credential)
            return answer

        return await change(self._store, call, request, run, 4 * max(1, request.limit))

    async def get_rollout(
        self, request: store_service_pb2.GetRolloutRequest, _call: Call
    ) -> store_service_pb2.GetRolloutResponse:
        """One rollout with its newest attempt."""

        def read(db: Connection) -> store_service_pb2.GetRolloutResponse:
            rows = select_rollouts(db, "WHERE r.rollout_id = ?", request.rollout_id)
            if not rows:
                raise not_found("rollout", request.rollout_id)
            return store_service_pb2.GetRolloutResponse(
                rollout=attempted_message(db, rows[0]), position=position(db)
            )

        return await self._store.read(read)

    async def list_rollouts(
        self, request: store_service_pb2.ListRolloutsRequest, _call: Call
    ) -> store_service_pb2.ListRolloutsResponse:
        """Rollouts by filter."""
        wanted = PageRequest(
            check_size(request.page_size), request.page_token, request.skip, request.include_total
        )
        order = order_of(request.order_by, request.order, _COLUMNS, "r.rollout_key", "create_time")

        def read(db: Connection) -> store_service_pb2.ListRolloutsResponse:
            where = condition_of(db, request.filter)
            page = fetch_page(db, "rollouts r", where.sql, where.values, order, wanted)
            answer = store_service_pb2.ListRolloutsResponse(
                next_page_token=page.next_token, position=position(db), total_size=page.total
            )
            for key in page.keys:
                answer.rollouts.append(load_listed(db, key, with_attempt=request.include_attempts))
            return answer

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

        def run(tx: Tx) -> store_service_pb2.CancelRolloutsResponse:
            answer = store_service_pb2.CancelRolloutsResponse()
            reason = request.reason or "cancelled by its owner"
            for row in self._chosen(tx, request.filter, f"NOT {_TERMINAL}"):
                if self._side.rollouts.cancel(tx, row, reason):
                    answer.rollout_ids.append(row.rollout_id)
            return answer

        return await change(self._store, call, request, run, 100)

    async def retry_rollouts(self, request: store_service_pb2.RetryRolloutsRequest, call: Call) -> bytes:
        """A new rollout for each chosen finished one."""

        def run(tx: Tx) -> store_service_pb2.RetryRolloutsResponse:
            rows = self._chosen(tx, request.filter, _TERMINAL)
            made = [self._side.rollouts.retry(tx, row) for row in rows]
            return store_service_pb2.RetryRolloutsResponse(rollouts=made)

        return await change(self._store, call, request, run, 100)

    async def delete_rollouts(self, request: store_service_pb2.DeleteRolloutsRequest, call: Call) -> bytes:
        """Deletes finished rollouts with all that belongs to them."""

        key = request_key(call, request)
        known = await self._store.write(lambda tx: idempotency.find(tx, key))
        if known is not None:
            return known
        answer = store_service_pb2.DeleteRolloutsResponse()
        last = 0
        # Many transactions, so that others get their turn; a call that is repeated after a crash goes on.
        while (done := await self._store.write(partial(self._delete_some, request, last))) is not None:
            answer.deleted += done.deleted
            answer.kept += done.kept
            last = done.last_key
        return await self._store.change(key, lambda tx: answer.SerializeToString())

    def _delete_some(
        self, request: store_service_pb2.DeleteRolloutsRequest, last: int, tx: Tx
    ) -> Deleted | None:
        """Deletes the next of the chosen rollouts; None = there are no more."""
        where = condition_of(tx.connection, request.filter)
        rows = rollouts_where(
            tx.connection,
            f"r WHERE {where.sql} AND r.rollout_key > ? ORDER BY r.rollout_key LIMIT ?",
            *(*where.values, last, STEP),
        )
        return self._side.deletion.delete(tx, rows, dry_run=request.dry_run) if rows else None

    def _chosen(self, tx: Tx, chosen: rollout_pb2.RolloutFilter, also: str) -> list[RolloutRow]:
        where = condition_of(tx.connection, chosen)
        keys = tx.execute(
            f"SELECT r.rollout_key FROM rollouts r WHERE {where.sql} AND {also} ORDER BY r.rollout_key",
            where.values,
        ).fetchall()
        return [rollout_by_key(tx.connection, key) for (key,) in keys]

    async def wait_rollouts(
        self, request: store_service_pb2.WaitRolloutsRequest, call: Call
    ) -> store_service_pb2.WaitRolloutsResponse:
        """Long poll until rollouts or groups are finished or sealed."""
        at_most(len(request.rollout_ids), limits.BATCH_ITEMS, "rollout_ids")
        at_most(len(request.group_ids), 1000, "group_ids")
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
        rollouts, complete = await wait.run(call.wait_limit(wanted))
        return store_service_pb2.WaitRolloutsResponse(
            rollouts=rollouts, complete=complete, position=wait.position
        )


def load_listed(db: Connection, key: int, *, with_attempt: bool) -> rollout_pb2.AttemptedRollout:
    """A rollout as lists and watches show it."""
    attempted = load_attempted(db, key)
    if not with_attempt:
        attempted.ClearField("attempt")
    return attempted
