"""Attempts: get, list, change."""

from __future__ import annotations

import hmac

from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import PageRequest, check_size, fetch_page, order_of
from agl_grpc.store.errors import illegal_transition, invalid_field, lease_lost, not_found
from agl_grpc.store.handlers.common import change, mask_paths
from agl_grpc.store.limits import ANSWER_BYTES
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.attempts import ATTEMPT, UPDATED, limited, signal
from agl_grpc.store.rollouts.encode import key_values_blob, load_attempt, load_attempts, time_of
from agl_grpc.store.rollouts.names import attempt_status
from agl_grpc.store.rollouts.rows import AttemptRow, attempt_by_key, attempt_by_name, rollout_by_id
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import LAST_TEXT
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, store_service_pb2

_AHEAD = 24 * 3600 * SECOND
_UPDATABLE = ("status", "worker_id", "last_heartbeat_time", "metadata", "failure")
_COLUMNS = {
    "sequence_id": "a.sequence_id",
    "start_time": "a.start_time",
    "end_time": "coalesce(a.end_time, 9223372036854775807)",
    "status": "a.status",
    "attempt_id": "a.attempt_id",
    "rollout_id": "a.rollout_key",
    "last_heartbeat_time": "coalesce(a.last_heartbeat_time, 9223372036854775807)",
    "worker_id": "coalesce((SELECT w.worker_id FROM workers w WHERE w.worker_key = a.worker_key), "
    f"{LAST_TEXT})",
}


class AttemptHandlers:
    """Serves the methods about attempts."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store

    async def list_attempts(
        self, request: store_service_pb2.ListAttemptsRequest, _call: Call
    ) -> store_service_pb2.ListAttemptsResponse:
        """A rollout's attempts."""
        wanted = PageRequest(
            check_size(request.page_size), request.page_token, request.skip, request.include_total
        )
        order = order_of(request.order_by, request.order, _COLUMNS, "a.attempt_key", "sequence_id")

        def read(db: Connection) -> store_service_pb2.ListAttemptsResponse:
            key = rollout_by_id(db, request.rollout_id).key
            page = fetch_page(db, "attempts a", "a.rollout_key = ?", [key], order, wanted)
            # A page ends early when its notes are large.
            listed = load_attempts(db, page.keys, most_bytes=ANSWER_BYTES)
            return store_service_pb2.ListAttemptsResponse(
                attempts=listed,
                next_page_token=page.token_after(len(listed)),
                total_size=page.total,
            )

        return await self._store.read(read)

    async def get_attempt(
        self, request: store_service_pb2.GetAttemptRequest, _call: Call
    ) -> store_service_pb2.GetAttemptResponse:
        """One attempt; unset when `latest` finds none."""

        def read(db: Connection) -> store_service_pb2.GetAttemptResponse:
            if request.attempt_id == "latest":
                key = rollout_by_id(db, request.rollout_id).latest_attempt_key
                if key is None:
                    return store_service_pb2.GetAttemptResponse()
            else:
                key = attempt_by_name(db, request.rollout_id, request.attempt_id).key
            return store_service_pb2.GetAttemptResponse(attempt=load_attempt(db, key))

        return await self._store.read(read)

    async def update_attempt(self, request: store_service_pb2.UpdateAttemptRequest, call: Call) -> bytes:
        """Changes an attempt; the status of a leased one needs its token."""
        paths = mask_paths(request.update_mask)
        for path in paths:
            if path not in _UPDATABLE:
                raise invalid_field("update_mask", f"may name {', '.join(_UPDATABLE)}; not {path!r}")

        def run(tx: Tx) -> store_service_pb2.UpdateAttemptResponse:
            wanted = request.attempt
            if not wanted.attempt_id:
                raise not_found("attempt", wanted.attempt_id)
            attempt = attempt_by_name(tx.connection, wanted.rollout_id, wanted.attempt_id)
            self._write(tx, attempt, wanted, paths)
            if "status" in paths:
                _require_token(attempt, request.lease_token)
                self._assign(tx, attempt_by_key(tx.connection, attempt.key), wanted, "failure" in paths)
            else:
                tx.event(attempt.run_key, ATTEMPT, UPDATED, attempt.key)
            return store_service_pb2.UpdateAttemptResponse(attempt=load_attempt(tx.connection, attempt.key))

        return await change(self._store, call, request, run, 4)

    def _write(self, tx: Tx, attempt: AttemptRow, wanted: attempt_pb2.Attempt, paths: list[str]) -> None:
        values: dict[str, object] = {}
        if "worker_id" in paths:
            values["worker_key"] = self._side.catalog.worker(tx, wanted.worker_id)
        if "last_heartbeat_time" in paths:
            heard = time_of(wanted.last_heartbeat_time)
            if heard > tx.now + _AHEAD:
                rule = "is more than 24 hours ahead of the store's clock"
                raise invalid_field("attempt.last_heartbeat_time", rule)
            values["last_heartbeat_time"] = min(tx.now, heard)
        if "metadata" in paths:
            values["metadata"] = key_values_blob(wanted.metadata)
        if "failure" in paths and "status" not in paths:
            values["failure"] = limited(wanted.failure).SerializeToString() or None
            values["failure_kind"] = int(wanted.failure.kind)
        for column, value in values.items():
            tx.execute(f"UPDATE attempts SET {column} = ? WHERE attempt_key = ?", (value, attempt.key))

    def _assign(self, tx: Tx, attempt: AttemptRow, wanted: attempt_pb2.Attempt, with_failure: bool) -> None:
        status = int(wanted.status)
        if status not in lifecycle.ATTEMPT_STATES:
            raise invalid_field("attempt.status", "must be a state")
        event = lifecycle.assign_attempt(status)
        if event is lifecycle.AttemptEvent.SIGNAL:
            signal(tx, attempt.key)
        elif event is not None:
            self._side.moves.end(tx, attempt, event, wanted.failure if with_failure else None)
        after = attempt_by_key(tx.connection, attempt.key)
        if after.status != status:
            before = attempt_status(attempt.status)
            raise illegal_transition("attempt", attempt.attempt_id, before, attempt_status(status))


def _require_token(attempt: AttemptRow, token: bytes) -> None:
    if not attempt.leased:
        return
    if attempt.lease_token is None or not hmac.compare_digest(attempt.lease_token, token):
        raise lease_lost(attempt.attempt_id, attempt_status(attempt.status))
