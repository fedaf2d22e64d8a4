"""Spans into the database, many messages in one transaction (R11, R14-R16, R19). Writer's thread only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agl_grpc.model import raw
from agl_grpc.store import errors
from agl_grpc.store.errors import StoreError
from agl_grpc.store.rollouts import attempts
from agl_grpc.store.rollouts.lifecycle import A_RUNNING, ATTEMPT_LIVE
from agl_grpc.store.spans.check import (
    DELTA,
    LATE,
    MODEL_CALL,
    WHOLE_GROUP,
    CheckedCall,
    CheckedGroup,
    id_of,
)
from agl_grpc.store.spans.lookup import SpanAttempt, distinct, load_attempts, stored_sequences
from agl_grpc.store.storage.bulk import update_rows
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2

ENTRY_SPANS = 1000
"""Most spans that one entry of the log names."""

ENTRY_BYTES = 256 << 10
"""Most bytes, as they are read, of the spans that one entry of the log names; a larger span stands alone."""

_COLUMNS = (
    "span_key",
    "attempt_key",
    "span_ref",
    "sequence_id",
    "received_time",
    "flags",
    "prompt_tokens",
    "data",
)
_NONE: dict[int, int] = {}
_RAISE_SEQUENCES = (
    "INSERT INTO span_sequences VALUES {rows} ON CONFLICT (rollout_key) DO UPDATE SET last = excluded.last"
)


class Producer(NamedTuple):
    """Where a message of a span stream comes from.

    Attributes:
        producer_id: The producer.
        epoch: Of its stream; an older one than the stored is fenced.
        sequence: The message's number.
    """

    producer_id: str
    epoch: int
    sequence: int


@dataclass
class SpanMessage:
    """One message of checked spans on its way to the disk.

    Attributes:
        groups: Spans by attempt.
        size: Bytes that it occupies in memory.
        rows: Spans that it holds.
        producer: Set for messages of a stream.
    """

    groups: Sequence[CheckedGroup]
    size: int
    rows: int
    producer: Producer | None = None


class Rejected(NamedTuple):
    """A span, an announcement or a whole group that was not stored.

    Attributes:
        group_index: The group's place in its message.
        place: The span's place in the group; -1 = the whole group, -2 = an announcement.
        span_id: Its id, where it is known.
        error: Why.
    """

    group_index: int
    place: int
    span_id: bytes
    error: StoreError


@dataclass
class SpanOutcome:
    """What became of a message. The message itself stays as it was: its transaction may run again.

    Attributes:
        stored: New spans.
        duplicates: Spans that were there before.
        sequence_ids: One for each span in the order sent, 0 for rejected ones.
        rejected: What was not stored, also for what the check of the message had found.
    """

    stored: int = 0
    duplicates: int = 0
    sequence_ids: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


class _Call(NamedTuple):
    """A model call that a prompt may be a difference to."""

    prompt_tokens: int
    data: bytes


@dataclass
class _Range:
    """Neighbouring new rows of an attempt that one entry of the log names.

    Attributes:
        low: Key of the first.
        high: Key of the last.
        spans: How many they are.
        size: Bytes that they have when they are read.
    """

    low: int
    high: int
    spans: int
    size: int


@dataclass
class _Totals:
    spans: int = 0
    size: int = 0
    late: int = 0


def write_messages(tx: Tx, messages: Sequence[SpanMessage]) -> list[SpanOutcome | StoreError]:
    """Store the messages' spans in order.

    Returns:
        For each message what became of it, or why it was refused as a whole (an older stream).
    """
    return _Flush(tx).run(messages)


class _Flush:
    """State of one transaction's worth of messages."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._values: list[int | bytes] = []  # rows of spans, one after the other
        self._attempts: dict[str, SpanAttempt] = {}
        self._have: dict[int, dict[int, int]] = {}
        self._epochs: dict[str, int] = {}
        self._sequences: dict[int, int] = {}
        self._new: dict[int, dict[int, int]] = {}
        self._calls: dict[tuple[int, int], _Call] = {}
        self._open: dict[int, int] = {}
        self._ranges: dict[int, list[_Range]] = {}
        self._totals: dict[int, _Totals] = {}
        self._marks: dict[str, int] = {}

    def run(self, messages: Sequence[SpanMessage]) -> list[SpanOutcome | StoreError]:
        self._look_up([group for message in messages for group in message.groups if not group.refused])
        outcomes = [self._message(message) for message in messages]
        self._tx.connection.load("spans", _COLUMNS, self._values)
        self._finish()
        return outcomes

    def _look_up(self, groups: Sequence[CheckedGroup]) -> None:
        """Reads at once what the groups are for, and which of their spans are there already."""
        db = self._tx.connection
        self._attempts = load_attempts(db, distinct(group.attempt_id for group in groups))
        # A rollout whose counter stands at 0 has no spans.
        wanted = [
            (attempt.key, ref)
            for group in groups
            if (attempt := self._attempts.get(group.attempt_id)) and attempt.last_sequence
            for ref in group.refs
        ]
        self._have = stored_sequences(db, wanted)

    def _message(self, message: SpanMessage) -> SpanOutcome | StoreError:
        if message.producer is not None:
            fenced = self._fence(message.producer)
            if fenced is not None:
                return fenced
        outcome = SpanOutcome()
        for group in message.groups:
            self._group(group, outcome)
        return outcome

    def _fence(self, producer: Producer) -> StoreError | None:
        name = producer.producer_id
        if name not in self._epochs:
            row = self._tx.execute(
                "SELECT epoch, last_sequence FROM span_producers WHERE producer_id = ?", (name,)
            ).fetchone()
            self._epochs[name], self._marks[name] = row or (0, 0)
        if self._epochs[name] != producer.epoch:
            return errors.stream_fenced(name, self._epochs[name])
        self._marks[name] = max(self._marks[name], producer.sequence)
        return None

    def _group(self, group: CheckedGroup, outcome: SpanOutcome) -> None:
        attempt = self._attempt(group, outcome)
        if attempt is None:
            outcome.sequence_ids.extend([0] * group.count)
            return
        key = attempt.key
        self._new.setdefault(key, {})
        self._announce(attempt, group.open_calls)
        have = self._have.get(key, _NONE)
        if (
            not have.keys().isdisjoint(group.refs)
            or group.calls
            or group.explicit
            or not self._plain(attempt, group)
        ):
            numbers = self._one_by_one(attempt, group, have, outcome)
        else:
            numbers = self._at_once(attempt, group, outcome)
        outcome.sequence_ids.extend(numbers)
        calls = [ref for place, ref in zip(group.places, group.refs, strict=True) if place in group.calls]
        self._close(attempt, calls + group.abandoned)

    def _plain(self, attempt: SpanAttempt, group: CheckedGroup) -> bool:
        """Whether all spans of the group are new, in time, and different from each other."""
        new = self._new[attempt.key]
        return (
            attempt.status in ATTEMPT_LIVE
            and not attempt.sealed
            and len(set(group.refs)) == group.count
            and new.keys().isdisjoint(group.refs)
        )

    def _at_once(self, attempt: SpanAttempt, group: CheckedGroup, outcome: SpanOutcome) -> Iterable[int]:
        """Store spans that need no look at each."""
        key, now, count = attempt.key, self._tx.now, group.count
        last = self._last_sequence(attempt)
        numbers = range(last + 1, last + 1 + count)
        self._sequences[attempt.rollout_key] = last + count
        first = self._tx.counters.take("spans", count)
        values = self._values
        for span_key, ref, number, data in zip(
            range(first, first + count), group.refs, numbers, group.data, strict=True
        ):
            values += (span_key, key, ref, number, now, 0, 0, data)
        self._new[key].update(zip(group.refs, numbers, strict=True))
        size = sum(map(len, group.data))
        self._count(attempt, count, size, 0)
        if count <= ENTRY_SPANS and size <= ENTRY_BYTES:
            self._extend(key, first, count, size)
        else:
            for place, data in enumerate(group.data):
                self._extend(key, first + place, 1, len(data))
        outcome.stored += count
        return numbers

    def _one_by_one(
        self, attempt: SpanAttempt, group: CheckedGroup, have: dict[int, int], outcome: SpanOutcome
    ) -> Iterable[int]:
        """Store spans of which each has to be looked at."""
        numbers = [0] * group.count
        new = self._new[attempt.key]
        for place, ref, start, data in zip(group.places, group.refs, group.starts, group.data, strict=True):
            call = group.calls.get(place)
            length = 0
            if call is not None:
                problem = self._delta_problem(attempt.key, call)
                if problem is not None:
                    outcome.rejected.append(Rejected(group.index, place, id_of(ref), problem))
                    continue
                length = call.base_length + call.new_tokens
                self._calls[attempt.key, ref] = _Call(length, data)
            sequence = have.get(ref) or new.get(ref)
            if sequence is None:
                sequence = new[ref] = self._next_sequence(attempt, group.explicit.get(place, 0))
                self._row(attempt, ref, sequence, start, call, length, data)
                outcome.stored += 1
            else:
                outcome.duplicates += 1
            numbers[place] = sequence
        return numbers

    def _row(
        self,
        attempt: SpanAttempt,
        ref: int,
        sequence: int,
        start: int,
        call: CheckedCall | None,
        length: int,
        data: bytes,
    ) -> None:
        late = _is_late(attempt, start)
        flags = LATE if late else 0
        if call is not None:
            flags |= MODEL_CALL | (DELTA if call.base else 0)
        key = self._tx.counters.take("spans")
        self._values += (key, attempt.key, ref, sequence, self._tx.now, flags, length, data)
        # A prompt that is stored as a difference is read whole.
        self._extend(attempt.key, key, 1, len(data) + (4 * length if flags & DELTA else 0))
        self._count(attempt, 1, len(data), int(late))

    def _extend(self, attempt_key: int, first: int, count: int, size: int) -> None:
        """Notes new rows for the log, in entries that a watch can send whole."""
        if not count:
            return  # only announcements
        ranges = self._ranges.setdefault(attempt_key, [])
        last = ranges[-1] if ranges else None
        if last is None or last.spans + count > ENTRY_SPANS or last.size + size > ENTRY_BYTES:
            ranges.append(_Range(first, first + count - 1, count, size))
        else:
            last.high, last.spans, last.size = first + count - 1, last.spans + count, last.size + size

    def _count(self, attempt: SpanAttempt, count: int, size: int, late: int) -> None:
        totals = self._totals.setdefault(attempt.run_key, _Totals())
        totals.spans += count
        totals.size += size
        totals.late += late

    def _attempt(self, group: CheckedGroup, outcome: SpanOutcome) -> SpanAttempt | None:
        """The attempt that a group is for; None = the group is refused as a whole."""
        if group.rejected:
            outcome.rejected += [Rejected(group.index, *one) for one in group.rejected]
        if group.refused:
            return None
        attempt = self._attempts.get(group.attempt_id)
        if attempt is not None and group.rollout_id in ("", attempt.rollout_id):
            return attempt
        unknown = group.attempt_id if attempt is None else f"{group.attempt_id} of rollout {group.rollout_id}"
        refusal = errors.not_found("attempt", unknown)
        outcome.rejected = [one for one in outcome.rejected if one.group_index != group.index]
        outcome.rejected.append(Rejected(group.index, WHOLE_GROUP, b"", refusal))
        return None

    def _delta_problem(self, attempt_key: int, span: CheckedCall) -> StoreError | None:
        """Why a prompt cannot be put together from its base; None = it can, or needs none."""
        if not span.base:
            return None
        base = self._call(attempt_key, span.base)
        if base is None:
            return errors.delta_base_unknown(id_of(span.base))
        have = base.prompt_tokens
        if span.base_length > have:
            choices = raw.RawSpan.FromString(base.data).model_call.choices
            if span.base_choice < len(choices):
                have += len(choices[span.base_choice].token_ids) // 4
        if span.base_length > have:
            return errors.delta_base_unknown(id_of(span.base), f"has only {have} tokens")
        return None

    def _call(self, attempt_key: int, ref: int) -> _Call | None:
        known = self._calls.get((attempt_key, ref))
        if known is None:
            row = self._tx.execute(
                "SELECT prompt_tokens, data FROM spans WHERE attempt_key = ? AND span_ref = ? "
                "AND flags & ? <> 0",
                (attempt_key, ref, MODEL_CALL),
            ).fetchone()
            if row is None:
                return None
            known = self._calls[attempt_key, ref] = _Call(*row)
        return known

    def _next_sequence(self, attempt: SpanAttempt, explicit: int) -> int:
        last = self._last_sequence(attempt)
        sequence = explicit or last + 1
        self._sequences[attempt.rollout_key] = max(last, sequence)
        return sequence

    def _last_sequence(self, attempt: SpanAttempt) -> int:
        return self._sequences.get(attempt.rollout_key, attempt.last_sequence)

    def _announce(self, attempt: SpanAttempt, calls: Sequence[tuple[int, int]]) -> None:
        if not calls or attempt.sealed:
            return
        key = attempt.key
        done = stored_sequences(self._tx.connection, [(key, ref) for ref, _ in calls]).get(key, {})
        done.update(self._new.get(key, {}))
        for ref, start in calls:
            # An announcement that overtakes nothing: its span may have come by another stream already.
            if ref not in done and not _is_late(attempt, start):
                cursor = self._tx.execute(
                    "INSERT INTO open_calls VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (key, ref, start)
                )
                self._count_open(attempt, cursor.rowcount)

    def _close(self, attempt: SpanAttempt, refs: Sequence[int]) -> None:
        for ref in refs:
            if attempt.open_calls + self._open.get(attempt.key, 0) <= 0:
                return
            cursor = self._tx.execute(
                "DELETE FROM open_calls WHERE attempt_key = ? AND span_ref = ?", (attempt.key, ref)
            )
            self._count_open(attempt, -cursor.rowcount)

    def _count_open(self, attempt: SpanAttempt, change: int) -> None:
        self._open[attempt.key] = self._open.get(attempt.key, 0) + change

    def _finish(self) -> None:
        tx = self._tx
        update_rows(tx.execute, _RAISE_SEQUENCES, list(self._sequences.items()))
        for producer_id, sequence in self._marks.items():
            tx.execute(
                "UPDATE span_producers SET last_sequence = ?, update_time = ? WHERE producer_id = ?",
                (sequence, tx.now, producer_id),
            )
        for run_key, totals in self._totals.items():
            tx.execute(
                "INSERT INTO span_totals VALUES (?, ?, ?, ?) ON CONFLICT (run_key) DO UPDATE SET "
                "spans = span_totals.spans + excluded.spans, bytes = span_totals.bytes + excluded.bytes, "
                "late = span_totals.late + excluded.late",
                (run_key, totals.spans, totals.size, totals.late),
            )
        told = [attempt for attempt in self._attempts.values() if attempt.key in self._new]
        attempts.signal_running(tx, [one.key for one in told if one.status == A_RUNNING])
        for attempt in told:
            self._tell(attempt)

    def _tell(self, attempt: SpanAttempt) -> None:
        """The log, the attempt's life and its seal learn of the spans."""
        key = attempt.key
        for some in self._ranges.get(key, ()):
            self._tx.event(
                attempt.run_key,
                event_pb2.ENTITY_KIND_SPANS,
                event_pb2.EVENT_KIND_CREATED,
                key,
                low=some.low,
                high=some.high,
            )
        if attempt.status != A_RUNNING:
            attempts.signal(self._tx, key)
        change = self._open.get(key, 0)
        if change:
            attempts.set_open_calls(self._tx, key, attempt.open_calls + change)


def _is_late(attempt: SpanAttempt, start_ns: int) -> bool:
    """Whether what began at this moment can no longer be trained (R11)."""
    if attempt.sealed:
        return True
    if attempt.status in ATTEMPT_LIVE or attempt.end_time is None:
        return False
    return start_ns > attempt.end_time * 1000


def last_sequences(db: Connection, rollout_keys: Sequence[int]) -> dict[int, int]:
    """The rollouts' highest sequence ids so far, by their keys; 0 = none."""
    last = dict.fromkeys(rollout_keys, 0)
    sql = "SELECT rollout_key, last FROM span_sequences WHERE rollout_key IN ({keys})"
    last.update(by_key(db, sql, list(last)).values())
    return last


def raise_sequences(tx: Tx, last: Mapping[int, int]) -> None:
    """Set the rollouts' highest sequence ids."""
    update_rows(tx.execute, _RAISE_SEQUENCES, list(last.items()))


def forget_spans(tx: Tx, rollout_key: int, attempt_keys: Iterable[int]) -> None:
    """Delete the spans of attempts that are deleted."""
    for key in attempt_keys:
        (run_key,) = tx.execute("SELECT run_key FROM attempts WHERE attempt_key = ?", (key,)).fetchone()
        delete_spans(tx, key, run_key)
        tx.execute("DELETE FROM open_calls WHERE attempt_key = ?", (key,))
    tx.execute("DELETE FROM span_sequences WHERE rollout_key = ?", (rollout_key,))


def delete_spans(tx: Tx, attempt_key: int, run_key: int) -> int:
    """Delete all spans of an attempt; returns how many bytes they had."""
    count, size, late = tx.execute(
        "SELECT count(*), CAST(coalesce(sum(length(data)), 0) AS BIGINT), "
        f"count(CASE WHEN flags & {LATE} <> 0 THEN 1 END) FROM spans WHERE attempt_key = ?",
        (attempt_key,),
    ).fetchone()
    tx.execute(
        "UPDATE span_totals SET spans = spans - ?, bytes = bytes - ?, late = late - ? WHERE run_key = ?",
        (count, size, late, run_key),
    )
    tx.execute("DELETE FROM spans WHERE attempt_key = ?", (attempt_key,))
    return int(size)
