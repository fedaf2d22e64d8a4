"""Every key that names a row names one that exists."""

from __future__ import annotations

from typing import NamedTuple

from agl_grpc.store.verify.types import Invariant, by_sql


class _Reference(NamedTuple):
    """A column that names a row of another table; `none` is the value that names nothing, besides NULL."""

    table: str
    column: str
    parent: str
    key: str = ""
    none: str = ""


_REFERENCES = (
    _Reference("queues", "run_key", "runs"),
    _Reference("groups", "run_key", "runs"),
    _Reference("resources", "run_key", "runs"),
    _Reference("training_runs", "run_key", "runs"),
    _Reference("policy_versions", "run_key", "runs"),
    _Reference("engines", "run_key", "runs"),
    _Reference("span_totals", "run_key", "runs"),
    _Reference("rollouts", "run_key", "runs"),
    _Reference("rollouts", "queue_key", "queues"),
    _Reference("rollouts", "group_key", "groups"),
    _Reference("rollouts", "label_set_key", "label_sets", none="0"),
    _Reference("rollouts", "resource_key", "resources"),
    _Reference("rollouts", "latest_attempt_key", "attempts", "attempt_key"),
    _Reference("rollout_bodies", "rollout_key", "rollouts"),
    _Reference("attempts", "run_key", "runs"),
    _Reference("attempts", "rollout_key", "rollouts"),
    _Reference("attempts", "worker_key", "workers"),
    _Reference("attempts", "resource_key", "resources"),
    _Reference("workers", "current_attempt_key", "attempts", "attempt_key"),
    _Reference("worker_commands", "worker_key", "workers"),
    _Reference("worker_commands", "attempt_key", "attempts"),
    _Reference("worker_commands", "resource_key", "resources"),
    _Reference("spans", "attempt_key", "attempts"),
    _Reference("open_calls", "attempt_key", "attempts"),
    _Reference("span_sequences", "rollout_key", "rollouts"),
    _Reference("rewards", "attempt_key", "attempts"),
    _Reference("gradings", "attempt_key", "attempts"),
    _Reference("training_metrics", "training_key", "training_runs"),
    _Reference("training_log", "training_key", "training_runs"),
    _Reference("training_results", "training_key", "training_runs"),
    _Reference("checkpoints", "training_key", "training_runs"),
    _Reference("batches", "training_key", "training_runs"),
    _Reference("batch_entries", "batch_key", "batches"),
    _Reference("engine_states", "policy_key", "policy_versions"),
    _Reference("blob_pieces", "blob_key", "blobs"),
    _Reference("blob_refs", "blob_key", "blobs"),
    _Reference("blob_refs", "rollout_key", "rollouts"),
)


def _check(reference: _Reference) -> Invariant:
    table, column, parent, key, none = reference
    key = key or column
    named = f"c.{column} IS NOT NULL" + (f" AND c.{column} <> {none}" if none else "")
    return by_sql(
        f"{table}.{column}",
        f"every {column} in {table} names a row of {parent}",
        f"a row of {table} names {column} {{0}}, which {parent} does not have ({{1}} rows)",
        f"SELECT c.{column}, count(*) FROM {table} c LEFT JOIN {parent} p ON p.{key} = c.{column} "
        f"WHERE {named} AND p.{key} IS NULL GROUP BY c.{column} ORDER BY c.{column}",
    )


REFERENCES: tuple[Invariant, ...] = tuple(map(_check, _REFERENCES))
