"""Rollouts whose run names graders are sealed only when their newest attempt is judged. Writer's thread only.

An attempt that waits for verdicts has a row in `gradings`. It goes with the last verdict (a value, or the
failure to give one), or when its time is over: then the missing verdicts are recorded as failures. So whoever
waits for sealed rollouts waits for rewards too, and never for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.rows import AttemptRow, RolloutRow, attempt_by_key, rollout_by_key
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, event_pb2, reward_pb2, run_pb2

_ROLLOUT = int(event_pb2.ENTITY_KIND_ROLLOUT)
_UPDATED = int(event_pb2.EVENT_KIND_UPDATED)
_SEALED = int(event_pb2.EVENT_KIND_SEALED)

DEFAULT_TIMEOUT = 600 * SECOND
"""Microseconds that verdicts are waited for unless the run says otherwise."""

PutRewards = Callable[[Tx, AttemptRow, str, Sequence[reward_pb2.Reward]], object]
"""Writes rewards of an attempt of a rollout."""


def graders_blob(graders: Iterable[run_pb2.RunGrader]) -> bytes | None:
    """Graders for storing; None = there are none.

    Raises:
        StoreError: INVALID_FIELD.
    """
    run = run_pb2.Run(graders=graders)
    names = [grader.name for grader in run.graders]
    for index, grader in enumerate(run.graders):
        path = f"run.graders[{index}]"
        if not grader.name.partition("/")[0] or names.count(grader.name) > 1:
            raise invalid_field(f"{path}.name", f"is {grader.name!r}; it must be a name of its own")
        if grader.HasField("weight") and not math.isfinite(grader.weight):
            raise invalid_field(f"{path}.weight", f"is {grader.weight}; it must be finite")
    return run.SerializeToString(deterministic=True) if run.graders else None


def hold(tx: Tx, rollout: RolloutRow, status: int) -> bool:
    """Whether a rollout that ends with this status must wait for graders; if so, it does from now on."""
    key = rollout.latest_attempt_key
    if status != lifecycle.SUCCEEDED or key is None or not _missing(tx, rollout.run_key, key):
        return False
    (timeout,) = tx.execute(
        "SELECT grading_timeout FROM runs WHERE run_key = ?", (rollout.run_key,)
    ).fetchone()
    due = tx.now + timeout
    tx.execute(
        "INSERT INTO gradings (attempt_key, run_key, due) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (key, rollout.run_key, due),
    )
    tx.arm(due)
    return True


def seal_rollout(tx: Tx, rollout: RolloutRow) -> None:
    """Marks a finished rollout whose newest attempt is sealed as sealed, unless it waits for graders."""
    if hold(tx, rollout, rollout.status):
        tx.event(rollout.run_key, _ROLLOUT, _UPDATED, rollout.key)  # its graders watch for it
    else:
        _seal(tx, rollout)


def answered(tx: Tx, attempt: AttemptRow) -> None:
    """Graders have written rewards of an attempt: its rollout may have waited for them."""
    waits = tx.execute("SELECT 1 FROM gradings WHERE attempt_key = ?", (attempt.key,)).fetchone()
    if waits and not _missing(tx, attempt.run_key, attempt.key):
        _release(tx, attempt.key)


def look_again(tx: Tx, run_key: int) -> None:
    """The run's graders have changed: what waits only for others waits no longer."""
    rows = tx.execute("SELECT attempt_key FROM gradings WHERE run_key = ?", (run_key,)).fetchall()
    for (key,) in rows:
        if not _missing(tx, run_key, key):
            _release(tx, key)


def sweep(tx: Tx, limit: int, put_rewards: PutRewards) -> None:
    """Records the verdicts that did not come in time as failures of their graders."""
    rows = tx.execute(
        "SELECT attempt_key, run_key FROM gradings WHERE due <= ? ORDER BY due LIMIT ?", (tx.now, limit)
    ).fetchall()
    for key, run_key in rows:
        attempt = attempt_by_key(tx.connection, key)
        rollout = rollout_by_key(tx.connection, attempt.rollout_key)
        missing = _missing(tx, run_key, key)
        if missing:
            # The last of them releases the rollout.
            put_rewards(tx, attempt, rollout.rollout_id, [_no_verdict(name, v) for name, v in missing])
        else:
            _release(tx, key)
    tx.arm(next_due(tx.connection))


def next_due(db: Connection) -> int | None:
    """When the wait for a verdict is next over; None = nothing waits."""
    (least,) = db.execute("SELECT min(due) FROM gradings").fetchone()
    return None if least is None else int(least)


def _no_verdict(name: str, version: str) -> reward_pb2.Reward:
    failure = attempt_pb2.Failure(
        kind=attempt_pb2.FAILURE_KIND_GRADER, type="no_verdict", message="no verdict came in time"
    )
    return reward_pb2.Reward(name=name, grader=name, grader_version=version, failure=failure)


def _missing(tx: Tx, run_key: int, attempt_key: int) -> list[tuple[str, str]]:
    """Names and versions of the run's graders whose newest word on the attempt is not there."""
    (blob,) = tx.execute("SELECT graders FROM runs WHERE run_key = ?", (run_key,)).fetchone()
    if not blob:
        return []
    wanted = {one.name.partition("/")[0]: one.version for one in run_pb2.Run.FromString(blob).graders}
    rows = tx.execute(
        "SELECT grader, grader_version FROM rewards WHERE attempt_key = ? AND name = grader "
        "AND target_ref = 0 AND step = -1 ORDER BY revision",
        (attempt_key,),
    ).fetchall()
    newest = dict(rows)
    return [
        (name, version)
        for name, version in wanted.items()
        if name not in newest or version not in ("", newest[name])
    ]


def _release(tx: Tx, attempt_key: int) -> None:
    tx.execute("DELETE FROM gradings WHERE attempt_key = ?", (attempt_key,))
    attempt = attempt_by_key(tx.connection, attempt_key)
    rollout = rollout_by_key(tx.connection, attempt.rollout_key)
    # By hand it may have been set to something else meanwhile.
    if rollout.status in lifecycle.ROLLOUT_TERMINAL and rollout.latest_attempt_key == attempt_key:
        _seal(tx, rollout)


def _seal(tx: Tx, rollout: RolloutRow) -> None:
    tx.execute("UPDATE rollouts SET sealed = 1 WHERE rollout_key = ?", (rollout.key,))
    tx.event(rollout.run_key, _ROLLOUT, _SEALED, rollout.key)
