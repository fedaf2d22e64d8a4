"""Rewards of attempts, spans and steps (R21)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agl_grpc.store import errors
from agl_grpc.store.rollouts.encode import key_values, key_values_blob, set_time
from agl_grpc.store.rollouts.rows import AttemptRow
from agl_grpc.store.spans.check import id_of, ref_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2, reward_pb2

PRIMARY = "primary"
"""Name of the reward that is trained on."""

NO_TARGET = 0
"""Stored target of a reward that judges no single span."""

NO_STEP = -1
"""Stored step of a reward that judges no single step."""

_SELECT = (
    "SELECT w.reward_key, r.rollout_id, a.attempt_id, w.name, w.target_ref, w.step, w.grader, w.revision, "
    "w.value, w.create_time, w.metadata FROM rewards w JOIN attempts a ON a.attempt_key = w.attempt_key "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key "
)


class _Name(NamedTuple):
    """What revisions of one reward have in common."""

    name: str
    target_ref: int
    step: int
    grader: str


def put_rewards(
    tx: Tx, attempt: AttemptRow, rollout_id: str, rewards: Sequence[reward_pb2.Reward]
) -> list[reward_pb2.Reward]:
    """Write rewards of one attempt.

    Args:
        tx: The transaction.
        attempt: The attempt.
        rollout_id: Its rollout.
        rewards: What to write; rollout and attempt may be left empty.

    Returns:
        The rewards as stored, with their revisions.

    Raises:
        StoreError: INVALID_FIELD, or ENTITY_EXISTS for a revision that says something else.
    """
    stored = []
    for index, reward in enumerate(rewards):
        path = f"rewards[{index}]"
        name = _check(reward, path)
        for given, known in ((reward.rollout_id, rollout_id), (reward.attempt_id, attempt.attempt_id)):
            if given not in ("", "latest", known):
                raise errors.invalid_field(path, f"is of {given}, not of {known}")
        stored.append(_put(tx, attempt, rollout_id, name, reward))
    return stored


def _check(reward: reward_pb2.Reward, path: str) -> _Name:
    if not reward.HasField("value") or not math.isfinite(reward.value):
        raise errors.invalid_field(f"{path}.value", "must be a finite number")
    if len(reward.name.encode()) > 128:
        raise errors.invalid_field(f"{path}.name", "must have at most 128 bytes")
    if len(reward.grader.encode()) > 256:
        raise errors.invalid_field(f"{path}.grader", "must have at most 256 bytes")
    target = reward.target_span_id
    if len(target) not in (0, 8) or (target and not any(target)):
        raise errors.invalid_field(f"{path}.target_span_id", "must be empty or 8 bytes, not all zero")
    step = reward.step if reward.HasField("step") else NO_STEP
    if reward.HasField("step") and step < 0:
        raise errors.invalid_field(f"{path}.step", "must not be negative")
    if reward.revision < 0:
        raise errors.invalid_field(f"{path}.revision", "must not be negative")
    return _Name(reward.name or PRIMARY, ref_of(target) if target else NO_TARGET, step, reward.grader)


def _put(
    tx: Tx, attempt: AttemptRow, rollout_id: str, name: _Name, reward: reward_pb2.Reward
) -> reward_pb2.Reward:
    key, revision = _existing(tx, attempt.key, name, reward)
    if key is None:
        key = tx.insert(
            "INSERT INTO rewards (attempt_key, name, target_ref, step, grader, revision, value, create_time, "
            "metadata) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING reward_key",
            (attempt.key, *name, revision, reward.value, tx.now, key_values_blob(reward.metadata)),
        )
        tx.event(attempt.run_key, event_pb2.ENTITY_KIND_REWARD, event_pb2.EVENT_KIND_CREATED, key)
    stored = reward_pb2.Reward()
    stored.CopyFrom(reward)
    stored.rollout_id, stored.attempt_id = rollout_id, attempt.attempt_id
    stored.name, stored.revision = name.name, revision
    set_time(stored.create_time, tx.now)
    return stored


def _existing(tx: Tx, attempt_key: int, name: _Name, reward: reward_pb2.Reward) -> tuple[int | None, int]:
    """The key of the same revision if it is stored already, and the revision to write."""
    where = "WHERE attempt_key = ? AND name = ? AND target_ref = ? AND step = ? AND grader = ?"
    (last,) = tx.execute(
        f"SELECT coalesce(max(revision), 0) FROM rewards {where}", (attempt_key, *name)
    ).fetchone()
    if not reward.revision:
        return None, last + 1
    row = tx.execute(
        f"SELECT reward_key, value FROM rewards {where} AND revision = ?",
        (attempt_key, *name, reward.revision),
    ).fetchone()
    if row is None:
        return None, reward.revision
    if row[1] != reward.value:
        raise errors.exists("reward", f"{name.name} revision {reward.revision}")
    return row[0], reward.revision


def load_rewards(db: Connection, keys: Iterable[int]) -> list[reward_pb2.Reward]:
    """Stored rewards by their keys, in that order."""
    found = []
    for key in keys:
        row = db.execute(_SELECT + "WHERE w.reward_key = ?", (key,)).fetchone()
        if row is not None:
            found.append(_message(*row[1:]))
    return found


def _message(
    rollout_id: str,
    attempt_id: str,
    name: str,
    target_ref: int,
    step: int,
    grader: str,
    revision: int,
    value: float,
    create_time: int,
    metadata: bytes | None,
) -> reward_pb2.Reward:
    reward = reward_pb2.Reward(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        name=name,
        grader=grader,
        revision=revision,
        value=value,
        target_span_id=id_of(target_ref) if target_ref != NO_TARGET else b"",
        step=None if step == NO_STEP else step,
    )
    set_time(reward.create_time, create_time)
    if metadata:
        reward.metadata.extend(key_values(metadata))
    return reward


def newest_rewards(db: Connection, attempt_key: int) -> list[reward_pb2.Reward]:
    """The rewards of an attempt in the order in which they were written, of each only the newest revision."""
    rows = db.execute(f"{_SELECT}WHERE w.attempt_key = ? ORDER BY w.reward_key", (attempt_key,)).fetchall()
    newest: dict[tuple[str, int, int, str], reward_pb2.Reward] = {}
    for row in rows:
        name = row[3:7]
        reward = _message(*row[1:])
        if name not in newest or reward.revision > newest[name].revision:
            newest.pop(name, None)  # what is written last stands last
            newest[name] = reward
    return list(newest.values())


def forget_rewards(tx: Tx, _rollout_key: int, attempt_keys: Iterable[int]) -> None:
    """Delete the rewards of attempts that are deleted."""
    tx.executemany("DELETE FROM rewards WHERE attempt_key = ?", [(key,) for key in attempt_keys])
