"""Batches: sealed attempts frozen into a content-hashed manifest, trained exactly once (R24, R25)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agl_grpc.sample import SampleRules, judge
from agl_grpc.sample.wire import rules_from_proto
from agl_grpc.store.errors import exists, illegal_transition, invalid_field, not_found
from agl_grpc.store.ids import mint
from agl_grpc.store.rewards import newest_rewards
from agl_grpc.store.rollouts.encode import set_time
from agl_grpc.store.rollouts.rows import RolloutRow, attempt_by_key, refuse_evicted, rollout_by_id
from agl_grpc.store.spans.check import LATE, MODEL_CALL, id_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.training.runs import TRAINING_RUN, TrainingRow
from agl_grpc.v1 import batch_pb2, event_pb2, rollout_pb2

CLAIMED = int(batch_pb2.BATCH_STATUS_CLAIMED)
COMMITTED = int(batch_pb2.BATCH_STATUS_COMMITTED)
RELEASED = int(batch_pb2.BATCH_STATUS_RELEASED)

_BATCH = event_pb2.ENTITY_KIND_BATCH
_UPDATED = event_pb2.EVENT_KIND_UPDATED
_NAMES = {CLAIMED: "claimed", COMMITTED: "committed", RELEASED: "released"}
# What is trained on can no longer be evaluated on.
_NEVER_TRAINED = {
    int(rollout_pb2.ROLLOUT_MODE_VAL): "val",
    int(rollout_pb2.ROLLOUT_MODE_TEST): "test",
}


@dataclass
class Claim:
    """What became of a claim.

    Attributes:
        key: The new batch; None = some rollouts are not sealed and nothing was claimed.
        unsealed: Those rollouts.
    """

    key: int | None = None
    unsealed: list[str] = field(default_factory=list)


def claim(
    tx: Tx,
    training: TrainingRow,
    step: int,
    rollout_ids: Sequence[str],
    wanted: batch_pb2.SampleRules | None = None,
) -> Claim:
    """Freeze the newest attempts of sealed rollouts into a batch.

    Args:
        tx: The transaction.
        training: The training run that the caller holds.
        step: The step that the batch is for.
        rollout_ids: The rollouts in the order in which they are trained.
        wanted: How samples are made of them; None = by the defaults.

    Raises:
        StoreError: INVALID_FIELD, of a rollout of mode val or test too; NOT_FOUND; or ILLEGAL_TRANSITION for
            a rollout that is claimed already.
    """
    if not rollout_ids or len(set(rollout_ids)) != len(rollout_ids):
        raise invalid_field("rollout_ids", "must name at least one rollout, each once")
    try:
        rules = rules_from_proto(wanted or batch_pb2.SampleRules())
    except ValueError as error:
        raise invalid_field("rules", str(error)) from error
    rollouts = [rollout_by_id(tx.connection, rollout_id) for rollout_id in rollout_ids]
    unsealed = [rollout.rollout_id for rollout in rollouts if not rollout.sealed]
    if unsealed:
        return Claim(unsealed=unsealed)
    entries = [_entry(tx, training, rollout, rules) for rollout in rollouts]
    raw = _frozen_before(tx, training, step, rollouts) or [
        entry.SerializeToString(deterministic=True) for entry in entries
    ]
    how = wanted.SerializeToString(deterministic=True) if wanted else b""
    names = (mint("ba"), training.key, CLAIMED, content_hash(raw, how))
    key = tx.insert(
        "INSERT INTO batches (batch_id, training_key, status, content_hash, trainer_epoch, step, "
        "create_time, rules) VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING batch_key",
        (*names, training.trainer_epoch, step, tx.now, how or None),
    )
    tx.executemany(
        "INSERT INTO batch_entries VALUES (?, ?, ?, ?)",
        [(key, place, rollouts[place].key, data) for place, data in enumerate(raw)],
    )
    tx.event(training.run_key, _BATCH, event_pb2.EVENT_KIND_CREATED, key)
    return Claim(key)


def _frozen_before(
    tx: Tx, training: TrainingRow, step: int, rollouts: Sequence[RolloutRow]
) -> list[bytes] | None:
    """The manifest under which an older epoch had claimed just these rollouts for this step (R25).

    A batch once made never changes (R21): made again, it has the rewards and spans that it had.
    """
    wanted = [rollout.key for rollout in rollouts]
    older = tx.execute(
        "SELECT batch_key FROM batches WHERE training_key = ? AND status = ? AND step = ? "
        "AND trainer_epoch < ? ORDER BY batch_key DESC",
        (training.key, RELEASED, step, training.trainer_epoch),
    ).fetchall()
    for (key,) in older:
        rows = tx.execute(
            "SELECT rollout_key, entry FROM batch_entries WHERE batch_key = ? ORDER BY place", (key,)
        ).fetchall()
        if [rollout_key for rollout_key, _ in rows] == wanted:
            return [entry for _, entry in rows]
    return None


def content_hash(entries: Iterable[bytes], rules: bytes = b"") -> str:
    """`sha256:<hex>` over manifest entries and then rules (if any), each after its length in 8 bytes."""
    digest = hashlib.sha256()
    for data in (*entries, rules) if rules else entries:
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return f"sha256:{digest.hexdigest()}"


def _entry(tx: Tx, training: TrainingRow, rollout: RolloutRow, rules: SampleRules) -> batch_pb2.ManifestEntry:
    if rollout.run_key != training.run_key:
        raise invalid_field("rollout_ids", f"names {rollout.rollout_id}, which belongs to another run")
    if rollout.latest_attempt_key is None:
        raise invalid_field("rollout_ids", f"names {rollout.rollout_id}, which never had an attempt")
    group_id, mode = _group_and_mode(tx, rollout.key)
    if mode in _NEVER_TRAINED:
        raise invalid_field(
            "rollout_ids",
            f"names {rollout.rollout_id}, whose mode is {_NEVER_TRAINED[mode]}: batches are trained, and "
            "evaluation never is",
        )
    taken = tx.execute(
        "SELECT b.batch_id FROM batch_entries e JOIN batches b ON b.batch_key = e.batch_key "
        "WHERE e.rollout_key = ? AND b.training_key = ? AND b.status <> ?",
        (rollout.key, training.key, RELEASED),
    ).fetchone()
    if taken is not None:
        raise illegal_transition("rollout", rollout.rollout_id, f"part of batch {taken[0]}", "claimed again")
    attempt = attempt_by_key(tx.connection, rollout.latest_attempt_key)
    refuse_evicted(tx.connection, [attempt.key])
    entry = batch_pb2.ManifestEntry(
        rollout_id=rollout.rollout_id, attempt_id=attempt.attempt_id, group_id=group_id
    )
    _freeze_rewards(tx, entry, attempt.key, rules)
    refs = tx.execute(
        "SELECT span_ref FROM spans WHERE attempt_key = ? AND flags & ? = ? ORDER BY sequence_id, span_key",
        (attempt.key, MODEL_CALL | LATE, MODEL_CALL),
    )
    entry.span_ids.extend(id_of(ref) for (ref,) in refs)
    return entry


def _freeze_rewards(tx: Tx, entry: batch_pb2.ManifestEntry, attempt_key: int, rules: SampleRules) -> None:
    """Writes the reward that counts into an entry, and all rewards where there are several."""
    rewards = newest_rewards(tx.connection, attempt_key)
    value = judge(rewards, rules).value
    if value is None:
        entry.rewards.extend(rewards)
        return
    entry.reward = value
    whole = [reward for reward in rewards if not reward.target_span_id and not reward.HasField("step")]
    counted = [reward.revision for reward in whole if reward.name in rules.counted_rewards]
    entry.reward_revision = max(counted, default=0)
    if len(rewards) > 1 or not counted or rules.reward_weights:
        entry.rewards.extend(rewards)


def _group_and_mode(tx: Tx, rollout_key: int) -> tuple[str, int]:
    group_id, mode = tx.execute(
        "SELECT g.group_id, r.mode FROM rollouts r LEFT JOIN groups g ON g.group_key = r.group_key "
        "WHERE r.rollout_key = ?",
        (rollout_key,),
    ).fetchone()
    return group_id or "", mode


def commit(
    tx: Tx, training: TrainingRow, batch_ids: Sequence[str], checkpoint_id: str, step: int, digest: str
) -> None:
    """Mark batches as trained by a checkpoint that was saved; the training run goes on from there.

    Raises:
        StoreError: INVALID_FIELD, NOT_FOUND, ENTITY_EXISTS, or ILLEGAL_TRANSITION for a batch of another
            epoch or checkpoint.
    """
    if not checkpoint_id:
        raise invalid_field("checkpoint_id", "must not be empty")
    known = tx.execute(
        "SELECT step, digest FROM checkpoints WHERE training_key = ? AND checkpoint_id = ?",
        (training.key, checkpoint_id),
    ).fetchone()
    if known is not None and known != (step, digest):
        raise exists("checkpoint", checkpoint_id)
    for batch_id in batch_ids:
        key, status, epoch, checkpoint = _batch(tx, training, batch_id)
        if status == COMMITTED and checkpoint == checkpoint_id:
            continue
        if status != CLAIMED or epoch != training.trainer_epoch:
            raise illegal_transition("batch", batch_id, _NAMES[status], f"committed by {checkpoint_id}")
        tx.execute(
            "UPDATE batches SET status = ?, checkpoint_id = ?, commit_time = ? WHERE batch_key = ?",
            (COMMITTED, checkpoint_id, tx.now, key),
        )
        tx.event(training.run_key, _BATCH, _UPDATED, key)
    if known is None:
        tx.execute(
            "INSERT INTO checkpoints (training_key, checkpoint_id, step, digest, create_time) "
            "VALUES (?, ?, ?, ?, ?)",
            (training.key, checkpoint_id, step, digest, tx.now),
        )
    tx.execute(
        "UPDATE training_runs SET checkpoint_id = ?, step = CASE WHEN step < ? THEN ? ELSE step END "
        "WHERE training_key = ?",
        (checkpoint_id, step, step, training.key),
    )
    tx.event(training.run_key, TRAINING_RUN, _UPDATED, training.key)


def release(tx: Tx, training: TrainingRow, batch_ids: Sequence[str]) -> None:
    """Give claimed batches back; their rollouts may be claimed again.

    Raises:
        StoreError: NOT_FOUND, or ILLEGAL_TRANSITION for a committed batch.
    """
    for batch_id in batch_ids:
        key, status, _, _ = _batch(tx, training, batch_id)
        if status == COMMITTED:
            raise illegal_transition("batch", batch_id, "committed", "released")
        if status == CLAIMED:
            _release(tx, training, key)


def release_all(tx: Tx, training: TrainingRow) -> None:
    """Give back whatever an older epoch had claimed and not committed (R25)."""
    rows = tx.execute(
        "SELECT batch_key FROM batches WHERE training_key = ? AND status = ? ORDER BY batch_key",
        (training.key, CLAIMED),
    ).fetchall()
    for (key,) in rows:
        _release(tx, training, key)


def _release(tx: Tx, training: TrainingRow, key: int) -> None:
    tx.execute("UPDATE batches SET status = ? WHERE batch_key = ?", (RELEASED, key))
    tx.event(training.run_key, _BATCH, _UPDATED, key)


def _batch(tx: Tx, training: TrainingRow, batch_id: str) -> tuple[int, int, int, str]:
    row = tx.execute(
        "SELECT batch_key, status, trainer_epoch, checkpoint_id FROM batches "
        "WHERE batch_id = ? AND training_key = ?",
        (batch_id, training.key),
    ).fetchone()
    if row is None:
        raise not_found("batch", batch_id)
    return row[0], row[1], row[2], row[3]


def load_batch(db: Connection, key: int) -> batch_pb2.Batch:
    """A batch that exists, with its manifest."""
    row = db.execute(
        "SELECT b.batch_id, t.training_run_id, r.run_id, b.status, b.content_hash, b.trainer_epoch, b.step, "
        "b.checkpoint_id, b.create_time, b.commit_time, b.rules FROM batches b "
        "JOIN training_runs t ON t.training_key = b.training_key JOIN runs r ON r.run_key = t.run_key "
        "WHERE b.batch_key = ?",
        (key,),
    ).fetchone()
    batch = batch_pb2.Batch(
        batch_id=row[0],
        training_run_id=row[1],
        run_id=row[2],
        status=row[3],
        content_hash=row[4],
        trainer_epoch=row[5],
        step=row[6],
        checkpoint_id=row[7],
    )
    set_time(batch.create_time, row[8])
    set_time(batch.commit_time, row[9])
    if row[10]:
        batch.rules.MergeFromString(row[10])
    for (data,) in db.execute("SELECT entry FROM batch_entries WHERE batch_key = ? ORDER BY place", (key,)):
        batch.entries.append(batch_pb2.ManifestEntry.FromString(data))
    return batch


def pins(tx: Tx, rollout_key: int) -> bool:
    """Whether a claimed batch names the rollout, or a committed one within its replay retention (R24)."""
    row = tx.execute(
        "SELECT 1 FROM batch_entries e JOIN batches b ON b.batch_key = e.batch_key "
        "JOIN training_runs t ON t.training_key = b.training_key JOIN runs r ON r.run_key = t.run_key "
        "WHERE e.rollout_key = ? AND (b.status = ? OR (b.status = ? AND (r.replay_retention IS NULL "
        "OR b.commit_time + r.replay_retention > ?))) LIMIT 1",
        (rollout_key, CLAIMED, COMMITTED, tx.now),
    ).fetchone()
    return row is not None
