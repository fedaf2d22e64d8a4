"""OTLP spans as spans of the contract: whose they are, and what model calls they tell of.

The contract's span has OTLP's numbers, so a span's bytes stay as they are. Its resource, its scope and what
is found in its attributes are put before and behind them as further fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from agl_grpc.model import gen_ai, semconv, wire
from agl_grpc.model.value import from_key_values
from agl_grpc.store import limits
from agl_grpc.v1 import span_pb2

_OURS = b"agentlightning."
_MOST_TEXT = 128


class Owner(NamedTuple):
    """Whose a span is, as its attributes or those of its resource say; empty = not said.

    Attributes:
        rollout_id: The rollout.
        attempt_id: The attempt.
        sequence_id: The caller's own sequence id; 0 = the store gives one.
    """

    rollout_id: str = ""
    attempt_id: str = ""
    sequence_id: int = 0


@dataclass
class SpanGroup:
    """Spans of one attempt; has of AttemptSpans what is read of one."""

    rollout_id: str
    attempt_id: str
    spans: list[bytes] = field(default_factory=list)
    open_calls: tuple[()] = ()
    abandoned_calls: tuple[()] = ()
    size: int = 0

    def ByteSize(self) -> int:
        """Bytes of all spans."""
        return self.size


@dataclass
class SpanRequest:
    """Spans by attempt; has of AppendSpansRequest what is read of one."""

    groups: list[SpanGroup]
    return_sequence_ids: bool = False


def requests_of(request: Any) -> Iterator[SpanRequest]:
    """A RawTraceRequest as requests of AppendSpans, as many as their limits ask for."""
    groups: dict[tuple[str, str], SpanGroup] = {}
    count = 0
    for owner, data in _spans(request):
        key = owner[:2]
        group = groups.get(key)
        if group is None:
            group = groups[key] = SpanGroup(*key)
        group.spans.append(data)
        group.size += len(data)
        count += 1
        if count == limits.SPANS_PER_MESSAGE:
            yield SpanRequest(list(groups.values()))
            groups, count = {}, 0
    if groups:
        yield SpanRequest(list(groups.values()))


def _spans(request: Any) -> Iterator[tuple[Owner, bytes]]:
    for of_resource in request.resource_spans:
        resource = of_resource.resource
        owner = _owner_of_resource(resource)
        before = wire.field(100, resource) if resource else b""
        for of_scope in of_resource.scope_spans:
            scope = of_scope.scope
            head = before
            if scope.name:
                head += wire.field(101, scope.name.encode())
            if scope.version:
                head += wire.field(102, scope.version.encode())
            for data in of_scope.spans:
                if _OURS in data or gen_ai.MARK in data:
                    yield _look_into(owner, head, data)
                elif owner.sequence_id:
                    yield owner, head + data + _sequence(owner)
                else:
                    # In front: were it behind, the rest of a broken span might read as a whole one.
                    yield owner, head + data


def _owner_of_resource(resource: bytes) -> Owner:
    if _OURS not in resource:
        return Owner()
    try:
        attributes = span_pb2.SpanResource.FromString(resource).attributes
    except DecodeError:
        return Owner()
    return _owner(Owner(), {entry.key: entry.value for entry in attributes})


def _look_into(owner: Owner, head: bytes, data: bytes) -> tuple[Owner, bytes]:
    """A span that says whose it is, or that may tell of a model call."""
    try:
        span = span_pb2.Span.FromString(data)
    except DecodeError:
        return owner, head + data  # refused where every span is checked
    owner = _owner(owner, {entry.key: entry.value for entry in span.attributes})
    behind = _sequence(owner)
    if gen_ai.MARK in data and not span.HasField("model_call"):
        call = gen_ai.model_call(from_key_values(span.attributes))
        if call is not None:
            behind += span_pb2.Span(model_call=call).SerializeToString()
    return owner, head + data + behind


def _owner(otherwise: Owner, attributes: dict[str, Any]) -> Owner:
    sequence = _text(attributes, semconv.SPAN_SEQUENCE_ID)
    number = int(sequence) if sequence.isdecimal() and len(sequence) < 19 else 0
    return Owner(
        _text(attributes, semconv.ROLLOUT_ID) or otherwise.rollout_id,
        _text(attributes, semconv.ATTEMPT_ID) or otherwise.attempt_id,
        number or otherwise.sequence_id,
    )


def _text(attributes: dict[str, Any], name: str) -> str:
    value = attributes.get(name)
    if value is None:
        return ""
    kind = value.WhichOneof("value")
    return str(getattr(value, kind))[:_MOST_TEXT] if kind in ("string_value", "int_value") else ""


def _sequence(owner: Owner) -> bytes:
    if not owner.sequence_id:
        return b""
    return span_pb2.Span(explicit_sequence_id=owner.sequence_id).SerializeToString()
