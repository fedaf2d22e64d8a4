"""Stored spans as readers get them: the bytes that arrived, prompts whole (R14, R19).

Answers are put together on the wire: a message that is built of a span, and copied into another one, costs
several times what the span's bytes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from agl_grpc.model import raw
from agl_grpc.model.wire import field, tag, varint
from agl_grpc.store.rollouts.encode import set_time
from agl_grpc.store.spans.check import DELTA, LATE, MODEL_CALL, ref_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks, padded
from agl_grpc.v1 import span_pb2, store_service_pb2

_TOKEN_BYTES = 4
_CHUNK = 512

_SPANS = tag(store_service_pb2.ListSpansResponse.SPANS_FIELD_NUMBER)
_STORED = span_pb2.StoredSpan
_SEQUENCE = varint(_STORED.SEQUENCE_ID_FIELD_NUMBER << 3)
_SPAN = tag(_STORED.SPAN_FIELD_NUMBER)
_IS_LATE = varint(_STORED.LATE_FIELD_NUMBER << 3) + b"\x01"


class SpanRow(NamedTuple):
    """A stored span with the names of what it belongs to."""

    span_key: int
    attempt_key: int
    span_ref: int
    sequence_id: int
    received_time: int
    flags: int
    data: bytes
    rollout_id: str
    attempt_id: str


_ROWS = (
    "SELECT s.span_key, s.attempt_key, s.span_ref, s.sequence_id, s.received_time, s.flags, s.data, "
    "r.rollout_id, a.attempt_id FROM spans s JOIN attempts a ON a.attempt_key = s.attempt_key "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key "
)


_BY_KEY = (
    "SELECT span_key, attempt_key, span_ref, sequence_id, received_time, flags, data FROM spans "
    "WHERE span_key IN"
)
_NAMES = (
    "SELECT r.rollout_id, a.attempt_id FROM attempts a JOIN rollouts r ON r.rollout_key = a.rollout_key "
    "WHERE a.attempt_key = ?"
)


def rows_by_key(db: Connection, keys: Sequence[int]) -> list[SpanRow]:
    """Spans by their keys, in that order; deleted ones are left out."""
    found: dict[int, tuple[Any, ...]] = {}
    for some in padded(keys, _CHUNK):
        for row in db.execute(f"{_BY_KEY} ({marks(len(some))})", some):
            found[row[0]] = row
    # Names are few: looked up once, not joined to every row.
    names: dict[int, tuple[str, str]] = {}
    for row in found.values():
        if row[1] not in names:
            names[row[1]] = db.execute(_NAMES, (row[1],)).fetchone()
    return [SpanRow._make((*row, *names[row[1]])) for row in map(found.get, keys) if row is not None]


def rows_where(db: Connection, where: str, values: Iterable[object]) -> list[SpanRow]:
    """Spans by a condition of this package's own making."""
    return [SpanRow._make(row) for row in db.execute(_ROWS + where, list(values))]


class SpanReader:
    """Turns rows into serialised StoredSpans. Remembers prompts, so that a conversation is put together once.

    Args:
        db: A read transaction.
        omit_tokens: Whether to leave token arrays out.
        whole: Whether to put prompts together; else they stay as they are stored.
    """

    def __init__(self, db: Connection, *, omit_tokens: bool = False, whole: bool = True) -> None:
        self._db = db
        self._omit = omit_tokens
        self._whole = whole
        self._sequences: dict[tuple[int, int], tuple[bytes, Any]] = {}
        self._names: dict[int, bytes] = {}
        self._times: dict[int, bytes] = {}

    def stored(self, row: SpanRow) -> bytes:
        """The row as StoredSpan."""
        data = self.data(row)
        names = self._names.get(row.attempt_key) or self._named(row)
        time = self._times.get(row.received_time) or self._timed(row.received_time)
        late = _IS_LATE if row.flags & LATE else b""
        sequence = varint(row.sequence_id)
        return b"".join((names, _SEQUENCE, sequence, time, _SPAN, varint(len(data)), data, late))

    def _named(self, row: SpanRow) -> bytes:
        names = _STORED(rollout_id=row.rollout_id, attempt_id=row.attempt_id).SerializeToString()
        self._names[row.attempt_key] = names
        return names

    def _timed(self, micros: int) -> bytes:
        moment = timestamp_pb2.Timestamp()
        set_time(moment, micros)
        self._times[micros] = time = field(_STORED.RECEIVED_TIME_FIELD_NUMBER, moment.SerializeToString())
        return time

    def data(self, row: SpanRow) -> bytes:
        """The span's bytes with the whole prompt, or without any tokens."""
        if not row.flags & MODEL_CALL:
            return row.data
        if self._omit:
            return _without_tokens(row.data)
        if not (row.flags & DELTA and self._whole):
            return row.data
        span = raw.RawSpan.FromString(row.data)
        prompt = self._prompt(row.attempt_key, row.span_ref, span.model_call)
        span.model_call.prompt.Clear()
        span.model_call.prompt.token_ids = prompt
        data: bytes = span.SerializeToString()
        return data

    def _prompt(self, attempt_key: int, ref: int, call: Any) -> bytes:
        """The whole prompt of a call, put together from the first call of its chain on."""
        chain = [(ref, call)]
        while chain[-1][1].prompt.base_span_id:
            base = ref_of(chain[-1][1].prompt.base_span_id)
            if (attempt_key, base) in self._sequences:
                break
            chain.append((base, self._load(attempt_key, base)))
        for ref_, call_ in reversed(chain):
            self._sequences[attempt_key, ref_] = (self._join(attempt_key, call_.prompt), call_)
        return self._sequences[attempt_key, ref][0]

    def _join(self, attempt_key: int, prompt: Any) -> bytes:
        own: bytes = prompt.token_ids
        if not prompt.base_span_id:
            return own
        before, call = self._sequences[attempt_key, ref_of(prompt.base_span_id)]
        wanted = prompt.base_length * _TOKEN_BYTES
        if wanted > len(before):
            before += call.choices[prompt.base_choice].token_ids
        return before[:wanted] + own

    def _load(self, attempt_key: int, ref: int) -> Any:
        row = self._db.execute(
            "SELECT data FROM spans WHERE attempt_key = ? AND span_ref = ?", (attempt_key, ref)
        ).fetchone()
        if row is None:
            # Spans go only with their whole attempt, so a base cannot be missing in a sound database.
            raise LookupError(f"base {ref:#x} of attempt {attempt_key} is missing")
        return raw.RawSpan.FromString(row[0]).model_call


class Answer:
    """The spans of an answer, serialised: `spans` is the first field of every message that has some.

    Attributes:
        count: How many they are.
        size: Bytes that they have.
    """

    def __init__(self) -> None:
        self.count = 0
        self.size = 0
        self._parts: list[bytes] = []

    def add(self, stored: bytes) -> None:
        """Adds a StoredSpan."""
        self.count += 1
        self.size += len(stored)
        self._parts += (_SPANS, varint(len(stored)), stored)

    def serialise(self, rest: Message) -> bytes:
        """The message with these spans and what else `rest` says."""
        return b"".join((*self._parts, rest.SerializeToString()))


def _without_tokens(data: bytes) -> bytes:
    span = raw.RawSpan.FromString(data)
    span.model_call.prompt.Clear()
    for choice in span.model_call.choices:
        for name in ("token_ids", "logprobs", "routed_experts", "kept_set_sizes"):
            choice.ClearField(name)
    stripped: bytes = span.SerializeToString()
    return stripped
