"""Spans between Agent Lightning's JSON and the contract, both ways and without loss.

What the contract's span has no place for (fields of the model that differ from what the others imply, and
fields that the model does not know) travels as JSON in one attribute, which REST takes out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from agl_grpc.model import gen_ai
from agl_grpc.model.value import to_key_values
from agl_grpc.store.http.problems import malformed
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import model_call_pb2, span_pb2

REMAINDER = "agl_grpc.rest"
"""The attribute that holds what the contract's span has no place for."""

_STATUSES = {
    "UNSET": span_pb2.SPAN_STATUS_CODE_UNSPECIFIED,
    "OK": span_pb2.SPAN_STATUS_CODE_OK,
    "ERROR": span_pb2.SPAN_STATUS_CODE_ERROR,
}
_STATUS_NAMES = {int(number): name for name, number in _STATUSES.items()}
_KNOWN = frozenset(
    {
        *("rollout_id", "attempt_id", "sequence_id", "trace_id", "span_id", "parent_id", "name", "status"),
        *("attributes", "events", "links", "start_time", "end_time", "context", "parent", "resource"),
    }
)
_NANOSECONDS_FROM = 1e12
"""Larger times are nanoseconds, smaller ones seconds, as the original reads them."""

_LAST_NS = 2**63 - 1


def read_span(fields: Fields) -> span_pb2.Span:
    """A span of the contract from its JSON.

    Raises:
        HttpProblem: 422 with the path of the field at fault.
    """
    status = fields.fields("status") or Fields({})
    code = status.choice("status_code", _STATUSES, "UNSET") or "UNSET"
    attributes = fields.mapping("attributes") or {}
    resource = fields.fields("resource") or Fields({})
    span = span_pb2.Span(
        trace_id=hex_id(fields, "trace_id", 16),
        span_id=hex_id(fields, "span_id", 8),
        parent_span_id=hex_id(fields, "parent_id", 8) if fields.text("parent_id") else b"",
        name=fields.required_text("name"),
        start_time_unix_nano=_nanoseconds(fields, "start_time"),
        end_time_unix_nano=_nanoseconds(fields, "end_time"),
        status=span_pb2.SpanStatus(code=_STATUSES[code], message=status.text("description") or ""),
        events=[_event(Fields(e, f"events[{i}]")) for i, e in enumerate(fields.items("events") or ())],
        links=[_link(Fields(one, f"links[{i}]")) for i, one in enumerate(fields.items("links") or ())],
        explicit_sequence_id=fields.integer("sequence_id", 0, least=0, most=2**62),
    )
    _set_attributes(span.attributes, attributes, "attributes")
    if resource.values.get("attributes"):
        _set_attributes(span.resource.attributes, resource.mapping("attributes") or {}, "resource.attributes")
    context = fields.fields("context")
    if context is not None and context.mapping("trace_state"):
        span.trace_state = ",".join(f"{key}={value}" for key, value in context.values["trace_state"].items())
    _keep_remainder(span, fields.values)
    call = gen_ai.model_call(attributes)
    if call is not None:
        span.model_call.CopyFrom(call)
    return span


def show_span(span: span_pb2.Span, rollout_id: str, attempt_id: str, sequence_id: int) -> dict[str, Any]:
    """A stored span as JSON."""
    attributes = show.notes(span.attributes)
    remainder = attributes.pop(REMAINDER, None)
    if span.HasField("model_call"):
        _add_tokens(attributes, span.model_call)
    trace_id, span_id = span.trace_id.hex().rjust(32, "0"), span.span_id.hex()
    parent_id = span.parent_span_id.hex() or None
    shown: dict[str, Any] = {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": sequence_id,
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent_id,
        "name": span.name,
        "status": {
            "status_code": _STATUS_NAMES.get(int(span.status.code), "UNSET"),
            "description": span.status.message or None,
        },
        "attributes": attributes,
        "events": [_show_event(event) for event in span.events],
        "links": [_show_link(link) for link in span.links],
        "start_time": _seconds(span.start_time_unix_nano),
        "end_time": _seconds(span.end_time_unix_nano),
        "context": _context(trace_id, span_id, span.trace_state),
        "parent": None if parent_id is None else _context(trace_id, parent_id, ""),
        "resource": {"attributes": show.notes(span.resource.attributes), "schema_url": ""},
    }
    if isinstance(remainder, str):
        shown.update(orjson.loads(remainder))
    return shown


def _add_tokens(attributes: dict[str, Any], call: model_call_pb2.ModelCall) -> None:
    """What our interceptor captured, under the names that Agent Lightning's adapters read."""
    if not call.choices or gen_ai.response_token_ids(attributes):
        return
    first = call.choices[0]
    attributes["prompt_token_ids"] = list(call.prompt.token_ids)
    attributes["response_token_ids"] = list(first.token_ids)
    attributes.setdefault("gen_ai.request.model", call.model)
    if call.request_id:
        attributes.setdefault("gen_ai.response.id", call.request_id)
    if call.logprob_semantics:
        entries: list[dict[str, Any]] = [
            {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
            for token, logprob in zip(first.token_ids, first.logprobs, strict=True)
        ]
        attributes.setdefault(gen_ai.LOGPROBS, orjson.dumps(entries).decode())


def hex_id(fields: Fields, name: str, length: int) -> bytes:
    """An id in hex digits as bytes."""
    text = fields.required_text(name)
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != length or len(text) != 2 * length:
        raise malformed(fields.at(name), f"is {text[:64]!r}; it must be {2 * length} hex digits")
    return data


def _keep_remainder(span: span_pb2.Span, values: Mapping[str, Any]) -> None:
    remainder = {name: value for name, value in values.items() if name not in _KNOWN}
    implied = show_span(span, "", "", 0)
    for name in ("context", "parent", "resource", "status", "events", "links"):
        given = values.get(name)
        if given is not None and _bare(given) != _bare(implied[name]):
            remainder[name] = given
    if remainder:
        try:
            text = orjson.dumps(remainder).decode()
        except TypeError as error:
            raise malformed("", f"cannot be kept: {error}") from error
        span.attributes.add(key=REMAINDER).value.string_value = text


def _bare(value: Any) -> Any:
    """The value without nulls: a field that is null says as much as one that is not there."""
    if isinstance(value, dict):
        return {name: _bare(one) for name, one in value.items() if one is not None}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def _nanoseconds(fields: Fields, name: str) -> int:
    value = fields.values.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value > _NANOSECONDS_FROM:
        found = value
    else:
        number = fields.number(name, 0.0, 1e20)
        if number is None:
            return 0
        found = int(number) if number > _NANOSECONDS_FROM else _exactly(number)
    if found > _LAST_NS:
        raise malformed(fields.at(name), "is too large for a time")
    return found


def _exactly(seconds: float) -> int:
    """Nanoseconds from which `_seconds` makes the same number again."""
    whole = int(seconds)
    return whole * 10**9 + round((seconds - whole) * 1e9)


def _seconds(nanoseconds: int) -> float | None:
    return nanoseconds / 1e9 if nanoseconds else None


def _set_attributes(target: Any, values: Mapping[str, Any], path: str) -> None:
    try:
        target.extend(to_key_values(values, path))
    except (ValueError, TypeError) as error:
        raise malformed(path, f"cannot be kept: {error}") from error


def _event(fields: Fields) -> span_pb2.SpanEvent:
    event = span_pb2.SpanEvent(
        name=fields.required_text("name"), time_unix_nano=_nanoseconds(fields, "timestamp")
    )
    _set_attributes(event.attributes, fields.mapping("attributes") or {}, fields.at("attributes"))
    return event


def _link(fields: Fields) -> span_pb2.SpanLink:
    context = fields.fields("context")
    if context is None:
        raise malformed(fields.at("context"), "is required")
    link = span_pb2.SpanLink(trace_id=hex_id(context, "trace_id", 16), span_id=hex_id(context, "span_id", 8))
    _set_attributes(link.attributes, fields.mapping("attributes") or {}, fields.at("attributes"))
    return link


def _show_event(event: span_pb2.SpanEvent) -> dict[str, Any]:
    return {
        "name": event.name,
        "attributes": show.notes(event.attributes),
        "timestamp": _seconds(event.time_unix_nano),
    }


def _show_link(link: span_pb2.SpanLink) -> dict[str, Any]:
    return {
        "context": _context(link.trace_id.hex(), link.span_id.hex(), link.trace_state),
        "attributes": show.notes(link.attributes) or None,
    }


def _context(trace_id: str, span_id: str, trace_state: str) -> dict[str, Any]:
    entries = (entry.partition("=") for entry in trace_state.split(","))
    return {
        "trace_id": trace_id,
        "span_id": span_id,
        "is_remote": False,
        "trace_state": {key.strip(): value.strip() for key, sign, value in entries if sign},
    }
