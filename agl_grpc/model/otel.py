"""OpenTelemetry spans in the contract's form, with nothing lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agl_grpc.model.value import to_key_values
from agl_grpc.v1 import span_pb2

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Link

# OpenTelemetry's Python enums begin at 0 for INTERNAL and its status codes are those of the contract.
_KIND_OFFSET = 1


def span_from_readable(span: ReadableSpan) -> span_pb2.Span:
    """Turn a finished span of the OpenTelemetry SDK into a span of the contract.

    What the contract cannot hold becomes text: integers beyond 64 bits, and half characters as escapes.
    """
    context = span.context
    if context is None:
        raise ValueError(f"span {span.name!r} has no context")
    parent = span.parent
    scope = span.instrumentation_scope
    return span_pb2.Span(
        trace_id=context.trace_id.to_bytes(16, "big"),
        span_id=context.span_id.to_bytes(8, "big"),
        trace_state=context.trace_state.to_header(),
        parent_span_id=parent.span_id.to_bytes(8, "big") if parent else b"",
        name=_utf8(span.name),
        kind=_number(span.kind.value + _KIND_OFFSET),
        start_time_unix_nano=span.start_time or 0,
        end_time_unix_nano=span.end_time or span.start_time or 0,
        attributes=_attributes(span.attributes),
        dropped_attributes_count=span.dropped_attributes,
        events=[_event(event) for event in span.events],
        dropped_events_count=span.dropped_events,
        links=[_link(link) for link in span.links],
        dropped_links_count=span.dropped_links,
        status=span_pb2.SpanStatus(
            message=_utf8(span.status.description or ""), code=_number(span.status.status_code.value)
        ),
        flags=int(context.trace_flags),
        resource=_resource(span.resource),
        scope_name=scope.name if scope else "",
        scope_version=(scope.version or "") if scope else "",
    )


# Spans of one provider share their resource, and it never changes.
_resources: dict[int, tuple[Resource, span_pb2.SpanResource]] = {}
_MOST_RESOURCES = 64


def _resource(resource: Resource) -> span_pb2.SpanResource:
    found = _resources.get(id(resource))
    if found is None or found[0] is not resource:
        if len(_resources) >= _MOST_RESOURCES:
            _resources.clear()
        found = (resource, span_pb2.SpanResource(attributes=_attributes(resource.attributes)))
        _resources[id(resource)] = found
    return found[1]


def _number(value: int) -> Any:  # the stubs give every enum an int type of its own
    return value


def _attributes(attributes: Mapping[str, Any] | None) -> Any:
    try:
        return to_key_values(attributes, "attributes")
    except (ValueError, TypeError):
        return to_key_values({_utf8(key): _plain(value) for key, value in (attributes or {}).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, bool | float | bytes) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    return _utf8(str(value))


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _event(event: Event) -> span_pb2.SpanEvent:
    return span_pb2.SpanEvent(
        name=_utf8(event.name), time_unix_nano=event.timestamp, attributes=_attributes(event.attributes)
    )


def _link(link: Link) -> span_pb2.SpanLink:
    return span_pb2.SpanLink(
        trace_id=link.context.trace_id.to_bytes(16, "big"),
        span_id=link.context.span_id.to_bytes(8, "big"),
        trace_state=link.context.trace_state.to_header(),
        attributes=_attributes(link.attributes),
        flags=int(link.context.trace_flags),
    )
