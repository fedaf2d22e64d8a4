"""A piece of an attempt's story."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, Self

from agl_grpc.model import semconv
from agl_grpc.model.enums import SpanKind, StatusCode, number_of
from agl_grpc.model.model_call import ModelCall
from agl_grpc.model.times import read_time
from agl_grpc.model.value import from_key_values, to_key_values
from agl_grpc.v1 import span_pb2


@dataclass(slots=True, kw_only=True)
class TraceStatus:
    """Outcome of the work that a span stands for; ``status_code`` ``None`` = not stated."""

    status_code: StatusCode | None = None
    description: str = ""


@dataclass(slots=True, kw_only=True)
class Event:
    """Something that happened at one moment of a span; ``time_ns`` is nanoseconds since the epoch."""

    name: str
    time_ns: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def timestamp(self) -> float:
        """The moment in seconds since the epoch."""
        return self.time_ns / 1e9


@dataclass(slots=True, kw_only=True)
class Link:
    """A pointer to another span, by hex ids."""

    trace_id: str
    span_id: str
    attributes: dict[str, Any] = field(default_factory=dict)
    trace_state: str = ""


@dataclass(slots=True, kw_only=True)
class SpanCoreFields:
    """What a span says, before it has a place in a trace. Times are seconds since the epoch."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    status: TraceStatus = field(default_factory=TraceStatus)
    start_time: float | None = None
    end_time: float | None = None


@dataclass(slots=True, kw_only=True)
class Span:
    """A span with its place. ``trace_id`` is 32, ``span_id`` and ``parent_id`` are 16 hex digits.

    Times are exact nanoseconds since the epoch; `start_time` and `end_time` give them in seconds.
    ``sequence_id`` counts the rollout's spans from 1; 0 = the store gives one. ``received_time`` and ``late``
    (came too late to be trained) are the store's.
    """

    rollout_id: str
    attempt_id: str
    name: str
    trace_id: str = field(default_factory=lambda: os.urandom(16).hex())
    span_id: str = field(default_factory=lambda: os.urandom(8).hex())
    parent_id: str | None = None
    sequence_id: int = 0
    start_time_ns: int = 0
    end_time_ns: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    status: TraceStatus = field(default_factory=TraceStatus)
    kind: SpanKind | None = None
    events: list[Event] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    scope_name: str = ""
    scope_version: str = ""
    trace_state: str = ""
    model_call: ModelCall | None = None
    received_time: float | None = None
    late: bool = False

    @property
    def start_time(self) -> float:
        """Start in seconds since the epoch."""
        return self.start_time_ns / 1e9

    @property
    def end_time(self) -> float:
        """End in seconds since the epoch."""
        return self.end_time_ns / 1e9

    @classmethod
    def from_attributes(
        cls,
        *,
        attributes: dict[str, Any],
        rollout_id: str = "",
        attempt_id: str = "",
        sequence_id: int = 0,
        name: str = semconv.SPAN_VIRTUAL,
        trace_id: str | None = None,
        span_id: str | None = None,
        parent_id: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        status: TraceStatus | None = None,
        resource: dict[str, Any] | None = None,
    ) -> Self:
        """A span made by hand: random ids, status ok, and now for whatever is not given."""
        start_ns = time.time_ns() if start_time is None else _nanoseconds(start_time)
        return cls(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            name=name,
            trace_id=trace_id or os.urandom(16).hex(),
            span_id=span_id or os.urandom(8).hex(),
            parent_id=parent_id,
            sequence_id=sequence_id,
            start_time_ns=start_ns,
            end_time_ns=start_ns if end_time is None else _nanoseconds(end_time),
            attributes=attributes,
            status=status or TraceStatus(status_code=StatusCode.OK),
            resource=resource or {},
        )

    @classmethod
    def from_core_fields(
        cls, core: SpanCoreFields, *, rollout_id: str, attempt_id: str, sequence_id: int = 0
    ) -> Self:
        """A root span in a trace of its own."""
        return cls.from_attributes(
            attributes=core.attributes,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=sequence_id,
            name=core.name,
            start_time=core.start_time,
            end_time=core.end_time,
            status=core.status,
        )

    @classmethod
    def from_proto(cls, message: span_pb2.StoredSpan) -> Self:
        """Read the stored form."""
        return cls.from_span_proto(
            message.span,
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            sequence_id=message.sequence_id,
            received_time=read_time(message, "received_time"),
            late=message.late,
        )

    @classmethod
    def from_span_proto(
        cls,
        span: span_pb2.Span,
        *,
        rollout_id: str,
        attempt_id: str,
        sequence_id: int = 0,
        received_time: float | None = None,
        late: bool = False,
    ) -> Self:
        """Read a span as producers send it."""
        return cls(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex() or None,
            sequence_id=sequence_id or span.explicit_sequence_id,
            start_time_ns=span.start_time_unix_nano,
            end_time_ns=span.end_time_unix_nano,
            attributes=from_key_values(span.attributes),
            status=TraceStatus(
                status_code=StatusCode.from_proto(span.status.code), description=span.status.message
            ),
            kind=SpanKind.from_proto(span.kind),
            events=[_event_from_proto(event) for event in span.events],
            links=[_link_from_proto(link) for link in span.links],
            resource=from_key_values(span.resource.attributes),
            scope_name=span.scope_name,
            scope_version=span.scope_version,
            trace_state=span.trace_state,
            model_call=ModelCall.from_proto(span.model_call) if span.HasField("model_call") else None,
            received_time=received_time,
            late=late,
        )

    def to_proto(self) -> span_pb2.Span:
        """Write the form in which producers send it.

        Raises `ValueError` for ids that are not hex of the right length.
        """
        status_code = self.status.status_code
        return span_pb2.Span(
            trace_id=id_bytes("trace_id", self.trace_id, 16),
            span_id=id_bytes("span_id", self.span_id, 8),
            trace_state=self.trace_state,
            parent_span_id=id_bytes("parent_id", self.parent_id, 8) if self.parent_id else b"",
            name=self.name,
            kind=number_of(self.kind),
            start_time_unix_nano=self.start_time_ns,
            end_time_unix_nano=self.end_time_ns,
            attributes=to_key_values(self.attributes, "attributes"),
            events=[_event_to_proto(event) for event in self.events],
            links=[_link_to_proto(link) for link in self.links],
            status=span_pb2.SpanStatus(message=self.status.description, code=number_of(status_code)),
            resource=_resource_to_proto(self.resource),
            scope_name=self.scope_name,
            scope_version=self.scope_version,
            model_call=self.model_call.to_proto() if self.model_call else None,
            explicit_sequence_id=self.sequence_id,
        )


def _resource_to_proto(attributes: dict[str, Any]) -> span_pb2.SpanResource | None:
    return span_pb2.SpanResource(attributes=to_key_values(attributes, "resource")) if attributes else None


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1_000_000) * 1000


def id_bytes(name: str, value: str, length: int) -> bytes:
    """An id in hex as its bytes; `ValueError` names it when it does not have so many."""
    try:
        data = bytes.fromhex(value)
    except ValueError:
        data = b""
    if len(data) != length:
        raise ValueError(f"{name} is {value!r}; it must be {2 * length} hex digits")
    return data


def _event_from_proto(message: span_pb2.SpanEvent) -> Event:
    return Event(
        name=message.name, time_ns=message.time_unix_nano, attributes=from_key_values(message.attributes)
    )


def _event_to_proto(event: Event) -> span_pb2.SpanEvent:
    return span_pb2.SpanEvent(
        name=event.name, time_unix_nano=event.time_ns, attributes=to_key_values(event.attributes, "event")
    )


def _link_from_proto(message: span_pb2.SpanLink) -> Link:
    return Link(
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        attributes=from_key_values(message.attributes),
        trace_state=message.trace_state,
    )


def _link_to_proto(link: Link) -> span_pb2.SpanLink:
    return span_pb2.SpanLink(
        trace_id=id_bytes("link.trace_id", link.trace_id, 16),
        span_id=id_bytes("link.span_id", link.span_id, 8),
        trace_state=link.trace_state,
        attributes=to_key_values(link.attributes, "link"),
    )
