"""RolloutFilter as SQL over `rollouts r`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agl_grpc.store.errors import not_found
from agl_grpc.store.rollouts.encode import time_of
from agl_grpc.store.storage.catalog import decode_labels
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks
from agl_grpc.v1 import common_pb2, rollout_pb2

ALL_RUNS = "*"


@dataclass
class Condition:
    """An SQL condition with its parameters."""

    sql: str
    values: list[object] = field(default_factory=list)


def run_key_of(db: Connection, run_id: str) -> int | None:
    """The run's key; empty = `default`; None = all runs (`*`).

    Raises:
        StoreError: NOT_FOUND.
    """
    if run_id == ALL_RUNS:
        return None
    row = db.execute("SELECT run_key FROM runs WHERE run_id = ?", (run_id or "default",)).fetchone()
    if row is None:
        raise not_found("run", run_id or "default")
    return int(row[0])


def condition_of(db: Connection, chosen: rollout_pb2.RolloutFilter) -> Condition:
    """The filter as a condition; the run always holds, the rest combines as `logic` says.

    Raises:
        StoreError: NOT_FOUND for an unknown run.
    """
    run_key = run_key_of(db, chosen.run_id)
    parts = _parts(db, chosen)
    joiner = " OR " if chosen.logic == common_pb2.FILTER_LOGIC_OR else " AND "
    sql = joiner.join(part.sql for part in parts) or "TRUE"
    values = [value for part in parts for value in part.values]
    if run_key is None:
        return Condition(f"({sql})", values)
    return Condition(f"r.run_key = ? AND ({sql})", [run_key, *values])


def _parts(db: Connection, chosen: rollout_pb2.RolloutFilter) -> list[Condition]:
    parts: list[Condition] = []
    if chosen.status_in:
        parts.append(_among("r.status", chosen.status_in))
    if chosen.rollout_id_in:
        parts.append(_among("r.rollout_id", chosen.rollout_id_in))
    if chosen.rollout_id_contains:
        parts.append(Condition("instr(r.rollout_id, ?) > 0", [chosen.rollout_id_contains]))
    if chosen.group_id_in:
        some = _among("group_id", chosen.group_id_in)
        parts.append(
            Condition(f"r.group_key IN (SELECT group_key FROM groups WHERE {some.sql})", some.values)
        )
    if chosen.queue_in:
        some = _among("name", chosen.queue_in)
        parts.append(
            Condition(f"r.queue_key IN (SELECT queue_key FROM queues WHERE {some.sql})", some.values)
        )
    if chosen.mode_in:
        parts.append(_among("r.mode", chosen.mode_in))
    if chosen.labels:
        parts.append(_with_labels(db, chosen.labels))
    if chosen.failure_kind_in:
        parts.append(_among("r.failure_kind", chosen.failure_kind_in))
    return parts + _times(chosen)


def _times(chosen: rollout_pb2.RolloutFilter) -> list[Condition]:
    parts: list[Condition] = []
    if chosen.HasField("create_time_before"):
        parts.append(Condition("r.create_time < ?", [time_of(chosen.create_time_before)]))
    if chosen.HasField("create_time_after"):
        parts.append(Condition("r.create_time >= ?", [time_of(chosen.create_time_after)]))
    if chosen.HasField("end_time_before"):
        parts.append(Condition("r.end_time < ?", [time_of(chosen.end_time_before)]))
    if chosen.HasField("end_time_after"):
        parts.append(Condition("r.end_time >= ?", [time_of(chosen.end_time_after)]))
    return parts


def _with_labels(db: Connection, labels: Sequence[common_pb2.Label]) -> Condition:
    wanted = {(label.key, label.value) for label in labels}
    rows = db.execute("SELECT label_set_key, labels FROM label_sets")
    return _among("r.label_set_key", [key for key, blob in rows if wanted <= decode_labels(blob)])


def _among(column: str, values: Iterable[object]) -> Condition:
    some = list(values)
    return Condition(f"{column} IN ({marks(len(some))})", some)
