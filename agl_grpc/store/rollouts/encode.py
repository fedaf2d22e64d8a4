"""Rows as messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from agl_grpc.store.clock import SECOND
from agl_grpc.store.limits import LARGE_ANSWER_BYTES
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key, marks, padded
from agl_grpc.v1 import attempt_pb2, common_pb2, rollout_pb2, run_pb2

_ROLLOUT = (
    "SELECT r.rollout_key, b.body, r.status, r.sealed, r.end_time, r.failure, r.attempt_count, a.attempt_id, "
    "s.resources_id, s.version, r.latest_attempt_key FROM rollouts r "
    "JOIN rollout_bodies b ON b.rollout_key = r.rollout_key "
    "LEFT JOIN attempts a ON a.attempt_key = r.latest_attempt_key "
    "LEFT JOIN resources s ON s.resource_key = r.resource_key "
)
_CHUNK = 256
_FIRST_CHUNK = 16
_ATTEMPT = (
    "SELECT a.attempt_key, a.attempt_id, a.sequence_id, a.status, a.start_time, a.end_time, w.worker_id, "
    "a.last_heartbeat_time, a.metadata, a.failure, s.resources_id, s.version, a.leased, a.sealed, "
    "a.seal_time, "
    "a.capture_incomplete, a.open_calls, a.lease_lost, r.rollout_id, a.spans_evicted FROM attempts a "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key "
    "LEFT JOIN workers w ON w.worker_key = a.worker_key "
    "LEFT JOIN resources s ON s.resource_key = a.resource_key "
)


def set_time(field: timestamp_pb2.Timestamp, micros: int | None) -> None:
    """Fills a timestamp field from microseconds; None leaves it unset."""
    if micros is not None:
        field.seconds, rest = divmod(micros, SECOND)
        field.nanos = rest * 1000


def time_of(field: timestamp_pb2.Timestamp) -> int:
    """Microseconds since the epoch."""
    return field.seconds * SECOND + field.nanos // 1000


def set_duration(field: duration_pb2.Duration, micros: int | None) -> None:
    """Fills a duration field from microseconds; None leaves it unset."""
    if micros is not None:
        field.seconds, rest = divmod(micros, SECOND)
        field.nanos = rest * 1000


def duration_of(field: duration_pb2.Duration) -> int:
    """Microseconds."""
    return field.seconds * SECOND + field.nanos // 1000


def rollout_message(row: Any) -> rollout_pb2.Rollout:
    """A Rollout from a row of `select_rollouts`."""
    rollout = rollout_pb2.Rollout.FromString(row[1])
    rollout.status = row[2]
    rollout.sealed = bool(row[3])
    set_time(rollout.end_time, row[4])
    if row[5]:
        rollout.failure.MergeFromString(row[5])
    rollout.attempt_count = row[6]
    if row[7]:
        rollout.latest_attempt_id = row[7]
    if row[8]:
        rollout.resources_id = row[8]
        rollout.resources_version = row[9]
    return rollout


def select_rollouts(db: Connection, where: str, *values: object) -> list[Any]:
    """Rows for `rollout_message`: [0] is the rollout's key, [10] its newest attempt's."""
    return db.execute(_ROLLOUT + where, values).fetchall()


def load_rollout(db: Connection, key: int) -> rollout_pb2.Rollout:
    """A rollout that exists."""
    return rollout_message(select_rollouts(db, "WHERE r.rollout_key = ?", key)[0])


def load_rollouts(db: Connection, keys: Iterable[int]) -> dict[int, rollout_pb2.Rollout]:
    """Those of the rollouts that exist, by key, in the order given."""
    wanted = list(keys)
    rows: list[Any] = []
    for part in padded(wanted, _CHUNK):
        rows += select_rollouts(db, f"WHERE r.rollout_key IN ({marks(len(part))})", *part)
    found = {row[0]: rollout_message(row) for row in rows}
    return {key: found[key] for key in wanted if key in found}


def fit(rollouts: Iterable[rollout_pb2.Rollout]) -> None:
    """Leaves out of an answer what its caller has already when the whole would be too large for a message."""
    found = list(rollouts)
    if sum(rollout.ByteSize() for rollout in found) > LARGE_ANSWER_BYTES:
        for rollout in found:
            rollout.ClearField("input")
            rollout.ClearField("metadata")


def attempt_message(row: Any) -> attempt_pb2.Attempt:
    """An Attempt from a row of `select_attempts`."""
    attempt = attempt_pb2.Attempt(
        rollout_id=row[18],
        attempt_id=row[1],
        sequence_id=row[2],
        status=row[3],
        worker_id=row[6] or "",
        resources_id=row[10] or "",
        resources_version=row[11] or 0,
        leased=bool(row[12]),
        sealed=bool(row[13]),
        capture_incomplete=bool(row[15]),
        open_calls=max(0, row[16]),
        lease_lost=bool(row[17]),
        spans_evicted=bool(row[19]),
    )
    set_time(attempt.start_time, row[4])
    set_time(attempt.end_time, row[5])
    set_time(attempt.last_heartbeat_time, row[7])
    set_time(attempt.seal_time, row[14])
    if row[8]:
        attempt.metadata.extend(key_values(row[8]))
    if row[9]:
        attempt.failure.MergeFromString(row[9])
    return attempt


def select_attempts(db: Connection, where: str, *values: object) -> list[Any]:
    """Rows for `attempt_message`: [0] is the attempt's key."""
    return db.execute(_ATTEMPT + where, values).fetchall()


def load_attempt(db: Connection, key: int) -> attempt_pb2.Attempt:
    """An attempt that exists."""
    return attempt_message(select_attempts(db, "WHERE a.attempt_key = ?", key)[0])


def load_attempts(
    db: Connection, keys: Sequence[int], *, most_bytes: int | None = None
) -> list[attempt_pb2.Attempt]:
    """Those of the attempts that exist, in the order given.

    Args:
        db: A read transaction.
        keys: The attempts.
        most_bytes: Stop when there are more than so many; None = never.
    """
    found: list[attempt_pb2.Attempt] = []
    size = start = 0
    chunk = _CHUNK if most_bytes is None else _FIRST_CHUNK
    while start < len(keys):
        rows = by_key(db, _ATTEMPT + "WHERE a.attempt_key IN ({keys})", keys[start : start + chunk])
        start += chunk
        for row in rows.values():
            found.append(attempt_message(row))
            size += found[-1].ByteSize()
            if most_bytes is not None and size > most_bytes:
                return found
        if most_bytes is not None:
            chunk = _next_chunk(most_bytes, size, len(found))
    return found


def _next_chunk(most_bytes: int, size: int, count: int) -> int:
    """No more than fit, if the others are as large as those before."""
    return max(1, min(_CHUNK, (most_bytes - size) * count // (size + 1)))


def load_attempted(db: Connection, key: int, attempt_key: int | None = None) -> rollout_pb2.AttemptedRollout:
    """A rollout with one of its attempts, by default the newest."""
    row = select_rollouts(db, "WHERE r.rollout_key = ?", key)[0]
    return attempted_message(db, row, attempt_key)


def load_listed(
    db: Connection, keys: Sequence[int], *, with_attempts: bool, most_bytes: int | None = None
) -> list[rollout_pb2.AttemptedRollout]:
    """Those of the rollouts that exist, in the order given, as lists and watches show them.

    Args:
        db: A read transaction.
        keys: The rollouts.
        with_attempts: Whether to add the newest attempts.
        most_bytes: Stop when there are more than so many; None = never.
    """
    found: list[rollout_pb2.AttemptedRollout] = []
    size = start = 0
    chunk = _CHUNK if most_bytes is None else _FIRST_CHUNK
    while start < len(keys):
        rollouts = load_rollouts(db, keys[start : start + chunk])
        start += chunk
        attempts: dict[str, attempt_pb2.Attempt] = {}
        if with_attempts:
            where = "WHERE a.attempt_key IN (SELECT latest_attempt_key FROM rollouts WHERE rollout_key IN"
            for part in padded(list(rollouts), _CHUNK):
                for row in select_attempts(db, f"{where} ({marks(len(part))}))", *part):
                    attempts[row[1]] = attempt_message(row)
        for rollout in rollouts.values():
            attempt = attempts.get(rollout.latest_attempt_id)
            found.append(rollout_pb2.AttemptedRollout(rollout=rollout, attempt=attempt))
            size += found[-1].ByteSize()
            if most_bytes is not None and size > most_bytes:
                return found
        if most_bytes is not None:
            chunk = _next_chunk(most_bytes, size, len(found))
    return found


def attempted_message(
    db: Connection, row: Any, attempt_key: int | None = None
) -> rollout_pb2.AttemptedRollout:
    """An AttemptedRollout from a row of `select_rollouts`."""
    attempted = rollout_pb2.AttemptedRollout(rollout=rollout_message(row))
    chosen = attempt_key or row[10]
    if chosen is not None:
        attempted.attempt.CopyFrom(load_attempt(db, chosen))
    return attempted


def key_values(blob: bytes) -> Iterable[common_pb2.KeyValue]:
    """Stored notes."""
    return common_pb2.KeyValueList.FromString(blob).values


def key_values_blob(values: Iterable[common_pb2.KeyValue]) -> bytes | None:
    """Notes for storing; None = there are none."""
    return common_pb2.KeyValueList(values=values).SerializeToString() or None


_RUN = (
    "SELECT run_key, run_id, create_time, metadata, allow_self_grading, retention, paused, seal_timeout, "
    "replay_retention, graders, grading_timeout FROM runs WHERE run_key IN ({keys})"
)
_PAUSED = "SELECT run_key, name FROM queues WHERE paused = 1 AND run_key IN"


def load_run(db: Connection, run_key: int) -> run_pb2.Run:
    """A run that exists."""
    (run,) = load_runs(db, [run_key])
    return run


def load_runs(db: Connection, keys: Sequence[int]) -> list[run_pb2.Run]:
    """Those of the runs that exist, in the order given."""
    found = {key: _run_message(row) for key, row in by_key(db, _RUN, keys).items()}
    for part in padded(keys, _CHUNK):
        for run_key, name in db.execute(f"{_PAUSED} ({marks(len(part))}) ORDER BY name", part):
            found[run_key].paused_queues.append(name)
    return list(found.values())


def _run_message(row: Any) -> run_pb2.Run:
    _, run_id, create_time, metadata, self_grading, retention, paused, *rest = row
    seal_timeout, replay, graders, grading_timeout = rest
    run = run_pb2.Run(run_id=run_id, allow_self_grading=bool(self_grading), paused=bool(paused))
    set_time(run.create_time, create_time)
    if metadata:
        run.metadata.extend(key_values(metadata))
    set_duration(run.retention, retention)
    set_duration(run.seal_timeout, seal_timeout)
    set_duration(run.replay_retention, replay)
    if graders:
        run.MergeFromString(graders)
        set_duration(run.grading_timeout, grading_timeout)
    return run
