"""Samples of batches, made from the spans that their manifests name; the fate of single tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agl_grpc.model import raw
from agl_grpc.sample import (
    AnswerFate,
    AttemptRecord,
    CallSpan,
    SampleError,
    SampleRules,
    TokenAccount,
    build_attempt,
    explain_attempt,
    pack,
)
from agl_grpc.sample.wire import rules_from_proto
from agl_grpc.store.errors import illegal_transition, not_found, replay_expired, samples_broken
from agl_grpc.store.rewards import newest_rewards
from agl_grpc.store.rollouts.rows import AttemptRow, refuse_evicted
from agl_grpc.store.spans.check import LATE, MODEL_CALL, id_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks, padded
from agl_grpc.store.training.batches import RELEASED
from agl_grpc.v1 import batch_pb2, reward_pb2

PAGE_TOKENS = 1 << 18
"""Tokens after which an answer ends; each attempt is whole in one answer."""

PAGE_ENTRIES = 256
"""Most attempts of one answer."""

_SPAN_CHUNK = 64


class BatchRow(NamedTuple):
    """A batch whose samples are asked for.

    Attributes:
        key: The batch.
        batch_id: Its id.
        status: Where it stands.
        rules: How its samples are made.
    """

    key: int
    batch_id: str
    status: int
    rules: SampleRules


@dataclass
class SamplePage:
    """Samples of some entries of a manifest.

    Attributes:
        columns: RawSampleColumns.
        account: Where their tokens went.
        next_entry: The entry after the last.
        done: Whether that was the manifest's last.
    """

    columns: Any
    account: TokenAccount
    next_entry: int
    done: bool


def batch_to_stream(db: Connection, batch_id: str) -> BatchRow:
    """A batch that is not released.

    Raises:
        StoreError: NOT_FOUND, or ILLEGAL_TRANSITION for a released one.
    """
    row = find_batch(db, batch_id, "")
    if row.status == RELEASED:
        raise illegal_transition("batch", batch_id, "released", "streamed; replay it by its content hash")
    return row


def find_batch(db: Connection, batch_id: str, content_hash: str) -> BatchRow:
    """A batch by its id, or else the newest with a content hash.

    Raises:
        StoreError: NOT_FOUND.
    """
    column, value = ("batch_id", batch_id) if batch_id else ("content_hash", content_hash)
    row = db.execute(
        f"SELECT batch_key, batch_id, status, rules FROM batches WHERE {column} = ? "
        "ORDER BY batch_key DESC LIMIT 1",
        (value,),
    ).fetchone()
    if row is None:
        raise not_found("batch", value)
    return BatchRow(row[0], row[1], row[2], rules_from_proto(batch_pb2.SampleRules.FromString(row[3] or b"")))


def sample_page(db: Connection, batch: BatchRow, first_entry: int) -> SamplePage:
    """Samples of a batch from an entry of its manifest on.

    Raises:
        StoreError: REPLAY_EXPIRED when spans of the manifest are gone.
    """
    entries = [
        batch_pb2.ManifestEntry.FromString(data)
        for (data,) in db.execute(
            "SELECT entry FROM batch_entries WHERE batch_key = ? AND place >= ? ORDER BY place LIMIT ?",
            (batch.key, first_entry, PAGE_ENTRIES + 1),
        )
    ]
    samples, account, used, tokens = [], TokenAccount(), 0, 0
    wanted = entries[:PAGE_ENTRIES]
    for start in range(0, len(wanted), _SPAN_CHUNK):
        for record in _records(db, wanted[start : start + _SPAN_CHUNK], batch):
            try:
                made = build_attempt(record, batch.rules)
            except SampleError as error:
                raise samples_broken(record.attempt_id, str(error)) from error
            samples += made.rows
            account.add(made.account)
            tokens += sum(row.length for row in made.rows)
            used += 1
            if tokens >= PAGE_TOKENS:
                break
        if tokens >= PAGE_TOKENS:
            break
    account.check()
    return SamplePage(pack(samples), account, first_entry + used, used == len(entries))


def _records(
    db: Connection, entries: Sequence[batch_pb2.ManifestEntry], batch: BatchRow
) -> list[AttemptRecord]:
    """What the store has of entries, in their order."""
    ids = [entry.attempt_id for entry in entries]
    attempts: dict[str, tuple[int, int, int]] = {}
    for some in padded(ids, _SPAN_CHUNK):
        for name, *state in db.execute(
            "SELECT attempt_id, attempt_key, capture_incomplete, spans_evicted FROM attempts "
            f"WHERE attempt_id IN ({marks(len(some))})",
            some,
        ):
            attempts[name] = (state[0], state[1], state[2])
    missing = next((name for name in ids if name not in attempts or attempts[name][2]), None)
    if missing is not None:
        raise replay_expired(batch.batch_id, missing)
    calls = call_spans(db, [attempts[name][0] for name in ids])
    records = []
    for entry in entries:
        key, incomplete, _ = attempts[entry.attempt_id]
        named = frozenset(entry.span_ids)
        spans = [call if call.span_id in named else call._replace(context=True) for call in calls[key]]
        if sum(not span.context for span in spans) != len(named):
            raise replay_expired(batch.batch_id, entry.attempt_id)
        records.append(
            AttemptRecord(
                entry.rollout_id,
                entry.attempt_id,
                entry.group_id,
                spans,
                frozen_rewards(entry, batch.rules),
                bool(incomplete),
            )
        )
    return records


def frozen_rewards(entry: batch_pb2.ManifestEntry, rules: SampleRules) -> list[reward_pb2.Reward]:
    """The rewards that a manifest froze."""
    if entry.rewards or not entry.HasField("reward"):
        return list(entry.rewards)
    # Weighted sums are frozen with their parts: a reward that stands alone is the one that counts.
    (name,) = rules.counted_rewards
    return [reward_pb2.Reward(name=name, value=entry.reward, revision=entry.reward_revision)]


def call_spans(db: Connection, attempt_keys: Sequence[int]) -> dict[int, list[CallSpan]]:
    """The model calls of attempts, in order of arrival, as they are stored."""
    found: dict[int, list[CallSpan]] = defaultdict(list)
    parse = raw.RawSpan.FromString
    for some in padded(attempt_keys, _SPAN_CHUNK):
        rows = db.execute(
            "SELECT attempt_key, span_ref, sequence_id, flags, data FROM spans "
            f"WHERE attempt_key IN ({marks(len(some))}) AND flags & {MODEL_CALL} <> 0 "
            "ORDER BY attempt_key, sequence_id, span_key",
            some,
        )
        for attempt_key, ref, sequence_id, flags, data in rows:
            span = parse(data)
            late = bool(flags & LATE)
            start = span.start_time_unix_nano
            found[attempt_key].append(CallSpan(id_of(ref), start, sequence_id, late, span.model_call))
    return found


class Explained(NamedTuple):
    """The fate of one choice's tokens, and the batches that contain them."""

    fate: AnswerFate
    batch_ids: list[str]


def explain(db: Connection, attempt: AttemptRow, rollout_id: str, span_id: bytes, choice: int) -> Explained:
    """What became of the tokens of one choice, by the newest batch that names its attempt.

    Raises:
        StoreError: NOT_FOUND for a call or choice that the attempt does not have.
    """
    refuse_evicted(db, [attempt.key])
    entry, rules, batch_ids = _newest_entry(db, attempt)
    (incomplete,) = db.execute(
        "SELECT capture_incomplete FROM attempts WHERE attempt_key = ?", (attempt.key,)
    ).fetchone()
    rewards = newest_rewards(db, attempt.key) if entry is None else frozen_rewards(entry, rules)
    spans = call_spans(db, [attempt.key])[attempt.key]
    record = AttemptRecord(rollout_id, attempt.attempt_id, "", spans, rewards, bool(incomplete))
    try:
        fates = explain_attempt(record, rules)
    except SampleError as error:
        raise samples_broken(attempt.attempt_id, str(error)) from error
    fate = next((each for each in fates if (each.span_id, each.choice) == (span_id, choice)), None)
    if fate is None:
        raise not_found("choice", f"{choice} of model call {span_id.hex()} in {attempt.attempt_id}")
    return Explained(fate, batch_ids)


def _newest_entry(
    db: Connection, attempt: AttemptRow
) -> tuple[batch_pb2.ManifestEntry | None, SampleRules, list[str]]:
    """The entry of the newest batch with an attempt, its rules, and the ids of all such batches."""
    rows = db.execute(
        "SELECT b.batch_id, b.rules, e.entry FROM batch_entries e "
        "JOIN batches b ON b.batch_key = e.batch_key "
        "WHERE e.rollout_key = ? AND b.status <> ? ORDER BY b.batch_key DESC",
        (attempt.rollout_key, RELEASED),
    ).fetchall()
    found = [
        (batch_id, rules, entry)
        for batch_id, rules, data in rows
        if (entry := batch_pb2.ManifestEntry.FromString(data)).attempt_id == attempt.attempt_id
    ]
    if not found:
        return None, SampleRules(), []
    rules = rules_from_proto(batch_pb2.SampleRules.FromString(found[0][1] or b""))
    return found[0][2], rules, [batch_id for batch_id, _, _ in found]
