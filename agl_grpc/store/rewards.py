"""Rewards of attempts, spans and steps (R21)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from agl_grpc.store import errors
from agl_grpc.store.rollouts import grading
from agl_grpc.store.rollouts.attempts import limited
from agl_grpc.store.rollouts.encode import key_values, key_values_blob, set_time
from agl_grpc.store.rollouts.rows import AttemptRow, RolloutRow
from agl_grpc.store.spans.check import id_of, ref_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key, marks, padded
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, event_pb2, reward_pb2

PRIMARY = "primary"
"""Name of the reward that is trained on."""

NO_TARGET = 0
"""Stored target of a reward that judges no single span."""

NO_STEP = -1
"""Stored step of a reward that judges no single step."""

_SELECT = (
    "SELECT w.reward_key, r.rollout_id, a.attempt_id, w.name, w.target_ref, w.step, w.grader, w.revision, "
    "w.value, w.create_time, w.metadata, w.failure, w.grader_version FROM rewards w "
    "JOIN attempts a ON a.attempt_key = w.attempt_key JOIN rollouts r ON r.rollout_key = a.rollout_key "
)


_AT_ONCE = 256
_ROWS_AT_ONCE = 64


class _Name(NamedTuple):
    """What revisions of one reward have in common."""

    name: str
    target_ref: int
    step: int
    grader: str


class _Said(NamedTuple):
    """What one revision says."""

    value: float
    version: str
    failure: bytes | None


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
    return _put(tx, [(attempt, rollout_id)] * len(rewards), rewards)


def put_all_rewards(
    tx: Tx, targets: Sequence[tuple[AttemptRow, RolloutRow]], rewards: Sequence[reward_pb2.Reward]
) -> list[reward_pb2.Reward]:
    """As `put_rewards`, for rewards of many attempts: each has its target at the same place."""
    return _put(tx, [(attempt, rollout.rollout_id) for attempt, rollout in targets], rewards)


def _put(
    tx: Tx, targets: Sequence[tuple[AttemptRow, str]], rewards: Sequence[reward_pb2.Reward]
) -> list[reward_pb2.Reward]:
    names = []
    for index, (reward, (attempt, rollout_id)) in enumerate(zip(rewards, targets, strict=True)):
        path = f"rewards[{index}]"
        names.append(_check(reward, path))
        for given, known in ((reward.rollout_id, rollout_id), (reward.attempt_id, attempt.attempt_id)):
            if given not in ("", "latest", known):
                raise errors.invalid_field(path, f"is of {given}, not of {known}")
    stands = _revisions(tx.connection, [attempt.key for attempt, _ in targets])
    rows: list[tuple[object, ...]] = []
    events: list[int] = []
    stored = []
    for reward, name, (attempt, rollout_id) in zip(rewards, names, targets, strict=True):
        before = stands.setdefault((attempt.key, *name), {})
        says = _Said(reward.value, reward.grader_version, _failure_blob(reward))
        revision = reward.revision or max(before, default=0) + 1
        if revision not in before:
            before[revision] = says
            metadata = key_values_blob(reward.metadata)
            rows.append(
                (attempt.key, *name, revision, says.value, tx.now, metadata, says.failure, says.version)
            )
            events.append(attempt.run_key)
        elif before[revision] != says:
            raise errors.exists("reward", f"{name.name} revision {revision}")
        one = reward_pb2.Reward()
        one.CopyFrom(reward)
        one.rollout_id, one.attempt_id = rollout_id, attempt.attempt_id
        one.name, one.revision = name.name, revision
        set_time(one.create_time, tx.now)
        stored.append(one)
    keys = _insert(tx, rows)
    answered = {attempt.key: attempt for attempt, _ in targets} if any(r.grader for r in rewards) else {}
    for attempt in answered.values():
        grading.answered(tx, attempt)
    for run_key, key in zip(events, keys, strict=True):
        tx.event(run_key, event_pb2.ENTITY_KIND_REWARD, event_pb2.EVENT_KIND_CREATED, key)
    return stored


def _failure_blob(reward: reward_pb2.Reward) -> bytes | None:
    """A failure within the contract's limits, for storing; None = there is a value."""
    if not reward.HasField("failure"):
        return None
    return limited(reward.failure).SerializeToString(deterministic=True)


def _revisions(db: Connection, attempt_keys: Sequence[int]) -> dict[tuple[Any, ...], dict[int, _Said]]:
    """What the attempts have, by attempt's key and name, and by revision."""
    found: dict[tuple[Any, ...], dict[int, _Said]] = {}
    for part in padded(list(dict.fromkeys(attempt_keys)), _AT_ONCE):
        for *name, revision, value, version, failure in db.execute(
            "SELECT attempt_key, name, target_ref, step, grader, revision, value, grader_version, failure "
            f"FROM rewards WHERE attempt_key IN ({marks(len(part))})",
            part,
        ):
            found.setdefault(tuple(name), {})[revision] = _Said(value, version, failure)
    return found


def _insert(tx: Tx, rows: Sequence[tuple[object, ...]]) -> list[int]:
    """Writes rewards; returns their keys, in order."""
    keys: list[int] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        one = f"({marks(len(part[0]))})"
        made = tx.execute(
            "INSERT INTO rewards (attempt_key, name, target_ref, step, grader, revision, value, create_time, "
            f"metadata, failure, grader_version) VALUES {','.join([one] * len(part))} RETURNING reward_key",
            [value for row in part for value in row],
        )
        # Rows get rising keys in the order given; in which order they come back nobody promises.
        keys += sorted(key for (key,) in made.fetchall())
    return keys


def _check(reward: reward_pb2.Reward, path: str) -> _Name:
    if reward.HasField("failure"):
        if reward.HasField("value") or reward.failure.kind != attempt_pb2.FAILURE_KIND_GRADER:
            raise errors.invalid_field(f"{path}.failure", "must have kind GRADER and stand without a value")
    elif not reward.HasField("value") or not math.isfinite(reward.value):
        raise errors.invalid_field(f"{path}.value", "must be a finite number")
    target = reward.target_span_id
    if len(target) not in (0, 8) or (target and not any(target)):
        raise errors.invalid_field(f"{path}.target_span_id", "must be empty or 8 bytes, not all zero")
    step = reward.step if reward.HasField("step") else NO_STEP
    return _Name(reward.name or PRIMARY, ref_of(target) if target else NO_TARGET, step, reward.grader)


def load_rewards(db: Connection, keys: Sequence[int]) -> list[reward_pb2.Reward]:
    """Stored rewards by their keys, in that order."""
    rows = by_key(db, _SELECT + "WHERE w.reward_key IN ({keys})", keys)
    return [_message(*row[1:]) for row in rows.values()]


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
    failure: bytes | None,
    grader_version: str,
) -> reward_pb2.Reward:
    reward = reward_pb2.Reward(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        name=name,
        grader=grader,
        revision=revision,
        value=None if failure is not None else value,
        grader_version=grader_version,
        target_span_id=id_of(target_ref) if target_ref != NO_TARGET else b"",
        step=None if step == NO_STEP else step,
    )
    set_time(reward.create_time, create_time)
    if metadata:
        reward.metadata.extend(key_values(metadata))
    if failure is not None:
        reward.failure.MergeFromString(failure)
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
