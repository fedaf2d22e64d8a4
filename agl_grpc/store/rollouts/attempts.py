"""Signs of life and sealing of attempts (R10, R11, R14). Writer's thread only."""

from __future__ import annotations

from collections.abc import Sequence

from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.grading import seal_rollout
from agl_grpc.store.rollouts.lifecycle import AttemptEvent, Outcome, RolloutEvent
from agl_grpc.store.rollouts.rows import (
    AttemptRow,
    RolloutRow,
    attempt_by_key,
    both_by_key,
    rollout_by_key,
)
from agl_grpc.store.storage.sql import marks, padded
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, event_pb2

ROLLOUT = int(event_pb2.ENTITY_KIND_ROLLOUT)
ATTEMPT = int(event_pb2.ENTITY_KIND_ATTEMPT)
CREATED = int(event_pb2.EVENT_KIND_CREATED)
UPDATED = int(event_pb2.EVENT_KIND_UPDATED)
TERMINAL = int(event_pb2.EVENT_KIND_TERMINAL)
SEALED = int(event_pb2.EVENT_KIND_SEALED)


_AT_ONCE = 64


def signal_running(tx: Tx, attempt_keys: Sequence[int]) -> None:
    """Spans of attempts that are RUNNING arrived."""
    for some in padded(attempt_keys, _AT_ONCE):
        tx.execute(
            f"UPDATE attempts SET last_heartbeat_time = ? WHERE attempt_key IN ({marks(len(some))})",
            (tx.now, *some),
        )


def signal(tx: Tx, attempt_key: int) -> None:
    """A span (or a duplicate of one) arrived: the agent is at work.

    PREPARING becomes RUNNING, and so does the rollout of the newest attempt. A silent attempt
    without a lease comes back while it can. An attempt that is over stays as it is.
    """
    attempt, rollout = both_by_key(tx.connection, attempt_key)
    if attempt.status == lifecycle.A_RUNNING:
        signal_running(tx, [attempt_key])
    if attempt.status not in (lifecycle.A_PREPARING, lifecycle.A_UNRESPONSIVE):
        return
    move = lifecycle.move_attempt(attempt.status, AttemptEvent.SIGNAL, revivable=revivable(attempt, rollout))
    if move.outcome is not Outcome.CHANGED:
        return
    due = lifecycle.next_due(True, attempt._replace(last_heartbeat=tx.now).clocks)
    tx.execute(
        "UPDATE attempts SET status = ?, last_heartbeat_time = ?, end_time = NULL, due = ?, "
        "failure_kind = 0, "
        "failure = NULL WHERE attempt_key = ?",
        (move.status, tx.now, due, attempt.key),
    )
    tx.arm(due)
    tx.event(attempt.run_key, ATTEMPT, UPDATED, attempt.key)
    if rollout.latest_attempt_key == attempt.key:
        _signal_rollout(tx, rollout, back=attempt.status == lifecycle.A_UNRESPONSIVE)


def _signal_rollout(tx: Tx, rollout: RolloutRow, *, back: bool) -> None:
    move = lifecycle.move_rollout(rollout.status, RolloutEvent.SIGNAL)
    if move.outcome is Outcome.CHANGED:
        tx.execute(
            "UPDATE rollouts SET status = ?, ready = 0, due = NULL, ended_attempts = ? WHERE rollout_key = ?",
            (move.status, rollout.ended_attempts - back, rollout.key),
        )
        tx.event(rollout.run_key, ROLLOUT, UPDATED, rollout.key)


def set_open_calls(tx: Tx, attempt_key: int, count: int) -> None:
    """Says how many model calls are open; the last one to close seals an attempt that is over."""
    tx.execute("UPDATE attempts SET open_calls = ? WHERE attempt_key = ?", (count, attempt_key))
    if count == 0:
        attempt = attempt_by_key(tx.connection, attempt_key)
        if attempt.seal_due is not None and not attempt.sealed:
            settle(tx, attempt)


def settle(tx: Tx, attempt: AttemptRow) -> None:
    """Seals an attempt that is over, or sets the moment when it will be."""
    seal = decide_seal(tx, attempt, over=True)
    tx.execute(
        "UPDATE attempts SET sealed = ?, seal_time = ?, seal_due = ?, due = ?, capture_incomplete = ? "
        "WHERE attempt_key = ?",
        (
            *(int(seal.now), tx.now if seal.now else None, seal.due, seal.look),
            *(int(seal.incomplete), attempt.key),
        ),
    )
    tx.arm(seal.look)
    if not seal.now:
        return
    tx.event(attempt.run_key, ATTEMPT, SEALED, attempt.key)
    rollout = rollout_by_key(tx.connection, attempt.rollout_key)
    if rollout.latest_attempt_key == attempt.key and rollout.status in lifecycle.ROLLOUT_TERMINAL:
        seal_rollout(tx, rollout)


def decide_seal(tx: Tx, attempt: AttemptRow, *, over: bool) -> lifecycle.Seal:
    """Whether an attempt is sealed now, be it over or not."""
    returned, timeout = tx.counters.last("returned"), 0
    if over and (attempt.open_calls > 0 or lifecycle.is_grace(tx.now, returned)):
        row = tx.execute("SELECT seal_timeout FROM runs WHERE run_key = ?", (attempt.run_key,)).fetchone()
        timeout = int(row[0])
    return lifecycle.seal(
        over=over,
        open_calls=attempt.open_calls,
        now=tx.now,
        seal_due=attempt.seal_due,
        seal_timeout=timeout,
        returned=returned,
    )


def note_return(tx: Tx) -> None:
    """R11: the store was away for producers of spans, who may hold calls that began meanwhile."""
    if tx.counters.last("attempts"):  # else there is nothing to hold calls of
        tx.counters.put("returned", tx.now)


def complete_failure(event: AttemptEvent, failure: attempt_pb2.Failure | None) -> attempt_pb2.Failure | None:
    """The failure as it is stored: limits kept, a kind filled in; None when the attempt succeeded."""
    kind = lifecycle.default_kind(event)
    if not kind:
        return None
    full = attempt_pb2.Failure()
    if failure is not None:
        full.CopyFrom(failure)
    if not full.kind:
        full.kind = attempt_pb2.FailureKind.ValueType(kind)
    return limited(full)


def limited(failure: attempt_pb2.Failure) -> attempt_pb2.Failure:
    """The failure with its texts cut to the contract's limits."""
    return attempt_pb2.Failure(
        kind=failure.kind,
        message=clip(failure.message, 4 << 10),
        type=clip(failure.type, 256),
        detail=clip(failure.detail, 64 << 10, keep_end=True),
    )


def clip(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Text of at most `limit` bytes of UTF-8, cut at the back, or at the front with `keep_end`."""
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return (raw[-limit:] if keep_end else raw[:limit]).decode(errors="ignore")


def revivable(attempt: AttemptRow, rollout: RolloutRow) -> bool:
    """Whether a silent attempt may come back."""
    return not attempt.sealed and lifecycle.is_revivable(
        attempt.status,
        leased=bool(attempt.leased),
        newest=rollout.latest_attempt_key == attempt.key,
        rollout_status=rollout.status,
    )
