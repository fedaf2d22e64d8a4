"""Workers: their life, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agl_grpc.store.clock import SECOND
from agl_grpc.store.rollouts.encode import key_values, key_values_blob, set_duration, set_time
from agl_grpc.store.storage.catalog import Catalog
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import runner_service_pb2, worker_pb2

SILENT_AFTER = 60 * SECOND
"""A worker that was not heard of for so long is shown as UNKNOWN."""

IDLE = int(worker_pb2.WORKER_STATUS_IDLE)
BUSY = int(worker_pb2.WORKER_STATUS_BUSY)
UNKNOWN = int(worker_pb2.WORKER_STATUS_UNKNOWN)
DRAINING = int(worker_pb2.WORKER_STATUS_DRAINING)

LEASES = "(SELECT count(*) FROM attempts l WHERE l.worker_key = w.worker_key AND l.lease_token IS NOT NULL)"


def status_sql(now: int) -> str:
    """SQL for a worker's state as of now, over `workers w`."""
    return (
        f"CASE WHEN coalesce(w.last_heartbeat_time, 0) < {now - SILENT_AFTER} THEN {UNKNOWN} "
        f"WHEN w.status = {DRAINING} THEN {DRAINING} "
        f"WHEN w.current_attempt_key IS NOT NULL OR {LEASES} > 0 THEN {BUSY} "
        f"WHEN w.status = 0 AND w.last_dequeue_time IS NULL THEN {UNKNOWN} ELSE {IDLE} END"
    )


def load_worker(db: Connection, worker_key: int, now: int) -> worker_pb2.Worker:
    """A worker that exists."""
    (worker,) = load_workers(db, [worker_key], now)
    return worker


def load_workers(db: Connection, keys: Sequence[int], now: int) -> list[worker_pb2.Worker]:
    """Those of the workers that exist, in the order given."""
    sql = (
        f"SELECT w.worker_key, w.worker_id, {status_sql(now)}, w.stats, w.last_heartbeat_time, "
        "w.last_dequeue_time, w.last_busy_time, w.last_idle_time, r.rollout_id, a.attempt_id, "
        f"{LEASES}, w.idle_reason, w.queues FROM workers w "
        "LEFT JOIN attempts a ON a.attempt_key = w.current_attempt_key "
        "LEFT JOIN rollouts r ON r.rollout_key = a.rollout_key WHERE w.worker_key IN ({keys})"
    )
    return [_message(row[1:]) for row in by_key(db, sql, keys).values()]


def _message(row: Any) -> worker_pb2.Worker:
    worker = worker_pb2.Worker(
        worker_id=row[0],
        status=row[1],
        current_rollout_id=row[7] or "",
        current_attempt_id=row[8] or "",
        lease_count=row[9],
        idle_reason=row[10],
    )
    if row[2]:
        worker.heartbeat_stats.extend(key_values(row[2]))
    for field, micros in (
        (worker.last_heartbeat_time, row[3]),
        (worker.last_dequeue_time, row[4]),
        (worker.last_busy_time, row[5]),
        (worker.last_idle_time, row[6]),
    ):
        set_time(field, micros)
    if row[11]:
        serves = worker_pb2.Worker.FromString(row[11])
        worker.queues.extend(serves.queues)
        worker.labels.extend(serves.labels)
    return worker


def heartbeat(tx: Tx, worker_key: int, request: runner_service_pb2.HeartbeatRequest) -> None:
    """A worker says that it lives; an unspecified state means idle until it takes something."""
    status = int(request.status) or IDLE
    tx.execute(
        "UPDATE workers SET last_heartbeat_time = ?, status = ?, idle_reason = ? WHERE worker_key = ?",
        (tx.now, status, request.idle_reason, worker_key),
    )
    if not request.keep_stats:
        tx.execute(
            "UPDATE workers SET stats = ? WHERE worker_key = ?", (key_values_blob(request.stats), worker_key)
        )


def asks(tx: Tx, worker_key: int) -> None:
    """A worker asks for work, whether there is any or not: a sign that it lives."""
    tx.execute(
        "UPDATE workers SET last_dequeue_time = ?, last_heartbeat_time = ? WHERE worker_key = ?",
        (tx.now, tx.now, worker_key),
    )


def open_stream(tx: Tx, worker_key: int, session_id: str) -> int:
    """Notes that a session's newest lease stream is the caller's; returns the stream's epoch."""
    return tx.insert(
        "UPDATE workers SET stream_session = ?, stream_epoch = stream_epoch + 1 WHERE worker_key = ? "
        "RETURNING stream_epoch",
        (session_id, worker_key),
    )


def is_newest_stream(tx: Tx, worker_key: int, session_id: str, epoch: int) -> bool:
    """Whether no later stream of this session was opened; streams of other sessions do not count."""
    row = tx.execute(
        "SELECT stream_session, stream_epoch FROM workers WHERE worker_key = ?", (worker_key,)
    ).fetchone()
    return row is None or row[0] != session_id or row[1] == epoch


def serves(tx: Tx, catalog: Catalog, worker_key: int, work: runner_service_pb2.WorkRequest) -> None:
    """Notes which queues and labels a worker serves."""
    notes = worker_pb2.Worker(queues=work.queues, labels=work.labels).SerializeToString()
    if not catalog.is_news(tx, worker_key, notes):
        return
    tx.execute(
        "UPDATE workers SET queues = ?, last_heartbeat_time = ?, "
        "status = CASE WHEN status = 0 THEN ? ELSE status END "
        "WHERE worker_key = ?",
        (notes or None, tx.now, IDLE, worker_key),
    )


_LEASE = (
    "SELECT a.attempt_key, r.rollout_id, a.attempt_id, w.worker_id, a.session_id, a.start_time, "
    "a.lease_expire_time, a.lease_duration, u.run_id FROM attempts a "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key JOIN runs u ON u.run_key = a.run_key "
    "LEFT JOIN workers w ON w.worker_key = a.worker_key WHERE a.attempt_key IN ({keys})"
)


def lease_infos(db: Connection, keys: Sequence[int]) -> list[worker_pb2.LeaseInfo]:
    """Live leases by their attempts' keys, tokens left out."""
    infos = []
    for _, rollout_id, attempt_id, worker_id, session_id, *times, run_id in by_key(db, _LEASE, keys).values():
        info = worker_pb2.LeaseInfo(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            worker_id=worker_id or "",
            session_id=session_id or "",
            run_id=run_id,
        )
        set_time(info.grant_time, times[0])
        set_time(info.expire_time, times[1])
        set_duration(info.duration, times[2])
        infos.append(info)
    return infos
