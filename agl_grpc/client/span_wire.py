"""Groups of spans as wire bytes, so that a span that is encoded once is never decoded on its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agl_grpc.model.span import Span
from agl_grpc.model.wire import varint
from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as pb

MAX_SPANS = 1000
MAX_BYTES = 1024 * 1024
MAX_SPAN_BYTES = 4 * 1024 * 1024

# Tags of length-delimited fields: number << 3 | 2.
_ROLLOUT_ID, _ATTEMPT_ID, _SPANS, _OPEN_CALLS, _ABANDONED_CALLS = b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x2a"
_MESSAGE_SEQUENCE, _MESSAGE_GROUPS = b"\x08", b"\x12"
_REQUEST_SPANS = b"\x12"


@dataclass(slots=True, frozen=True, kw_only=True)
class SpanGroup:
    """Spans of one attempt, and model calls of it that begin or were given up.

    A span may be a `Span`, the contract's message, or the bytes of one; ``abandoned_calls`` are span ids.
    """

    rollout_id: str
    attempt_id: str
    spans: Sequence[Span | span_pb2.Span | bytes] = ()
    open_calls: Sequence[span_pb2.OpenCall] = ()
    abandoned_calls: Sequence[bytes] = ()


@dataclass(slots=True, frozen=True)
class EncodedGroup:
    """A part of a group that fits into one message; ``first_span`` is its first span's place in the group."""

    key: tuple[str, str]
    body: bytes
    first_span: int
    span_count: int
    mergeable: bool

    @property
    def size(self) -> int:
        """Bytes on the wire, about."""
        return len(self.body) + len(self.key[0]) + len(self.key[1]) + 16


@dataclass(slots=True, frozen=True)
class Oversized:
    """A span that no store takes, left out; ``index`` is its place in the group."""

    index: int
    span_id: bytes
    size: int


def encode_group(group: SpanGroup) -> Iterator[EncodedGroup | Oversized]:
    """Encode a group in parts of at most 1000 spans and about 1 MiB; calls that begin travel first.

    Spans above 4 MiB are told apart: one of them would end the stream for all.
    """
    key = (group.rollout_id, group.attempt_id)
    body = bytearray()
    for call in group.open_calls:
        body += _field(_OPEN_CALLS, call.SerializeToString())
    first = count = 0
    calls = bool(group.open_calls)
    for place, span in enumerate(group.spans):
        data = _span_bytes(span)
        if len(data) > MAX_SPAN_BYTES:
            if count or calls:
                yield EncodedGroup(key, bytes(body), first, count, not calls)
            yield Oversized(place, span_pb2.Span.FromString(data).span_id, len(data))
            body, first, count, calls = bytearray(), place + 1, 0, False
            continue
        if count and (count >= MAX_SPANS or len(body) + len(data) > MAX_BYTES):
            yield EncodedGroup(key, bytes(body), first, count, not calls)
            body, first, count, calls = bytearray(), place, 0, False
        body += _field(_SPANS, data)
        count += 1
    for span_id in group.abandoned_calls:
        body += _field(_ABANDONED_CALLS, span_id)
    mergeable = not calls and not group.abandoned_calls
    yield EncodedGroup(key, bytes(body), first, count, mergeable)


def encode_groups(parts: Sequence[Sequence[EncodedGroup]]) -> bytes:
    """Encode the groups of a message; each is given as the parts that it is merged from."""
    chunks: list[bytes] = []
    for merged in parts:
        rollout_id, attempt_id = merged[0].key
        head = _field(_ROLLOUT_ID, rollout_id.encode()) + _field(_ATTEMPT_ID, attempt_id.encode())
        length = len(head) + sum(len(part.body) for part in merged)
        chunks += (_MESSAGE_GROUPS, varint(length), head, *(part.body for part in merged))
    return b"".join(chunks)


def encode_message(sequence: int, groups: bytes) -> bytes:
    """Encode a `StreamSpansRequest` with numbered spans."""
    number = _MESSAGE_SEQUENCE + varint(sequence)
    return b"".join((_REQUEST_SPANS, varint(len(number) + len(groups)), number, groups))


def encode_open(producer_id: str) -> bytes:
    """Encode the first `StreamSpansRequest` of a stream."""
    opening = pb.SpanStreamOpen(producer_id=producer_id, resume=True)
    return pb.StreamSpansRequest(open=opening).SerializeToString()


def _span_bytes(span: Span | span_pb2.Span | bytes) -> bytes:
    if isinstance(span, bytes):
        return span
    return (span.to_proto() if isinstance(span, Span) else span).SerializeToString()


def _field(tag: bytes, data: bytes) -> bytes:
    return b"".join((tag, varint(len(data)), data))
