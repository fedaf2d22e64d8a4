"""Rules that a span has to meet before it is stored (R14, R17-R19). Pure: no store, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from agl_grpc.model import raw
from agl_grpc.store import errors, limits
from agl_grpc.store.errors import StoreError
from agl_grpc.v1 import model_call_pb2, span_pb2

MODEL_CALL = 1
"""Flag of a stored span: it is a model call."""

LATE = 2
"""Flag of a stored span: it began after its attempt had ended, or came after sealing."""

DELTA = 4
"""Flag of a stored span: its prompt is a difference to an earlier call."""

WHOLE_GROUP = -1
"""Place of a rejection of a group as a whole."""

ANNOUNCEMENT = -2
"""Place of a rejection that is about an announced call, not about a span."""

_AHEAD_NS = 24 * 3600 * 10**9
_MAX_NAME = 1024
_MAX_ATTRIBUTES = 1024
_MAX_SIGNED = 2**63
_ZERO = bytes(8)
_ID_LENGTHS = (0, 8)
_TRACE_LENGTHS = (0, 16)
_MAX_EXPLICIT = 2**62


class CheckedCall(NamedTuple):
    """What else is known of a span that is a model call.

    Attributes:
        new_tokens: Prompt tokens that the span itself holds.
        base: Span of which the prompt is a continuation; 0 = none (all-zero ids are refused).
        base_choice: Choice of that call.
        base_length: Tokens kept of it.
    """

    new_tokens: int
    base: int
    base_choice: int
    base_length: int


@dataclass
class CheckedGroup:
    """Spans of one attempt, checked. What may be stored stands in columns of equal length.

    Attributes:
        path: Where the group stands in its message, for paths in errors.
        index: The group's place in its message.
        rollout_id: As given; empty = whatever rollout the attempt belongs to.
        attempt_id: The attempt.
        count: How many spans were sent.
        places: Column: the span's place in the group.
        refs: Column: its id as a signed integer.
        starts: Column: nanoseconds since the epoch.
        data: Column: its bytes.
        explicit: The caller's own sequence ids by place, where there is one.
        calls: Model calls by place.
        rejected: Refused spans: (place, span id, why); place -1 = the whole group, -2 = an announcement.
        open_calls: Model calls announced: (ref, start in ns).
        abandoned: Announced calls that ended without a span.
    """

    path: str
    index: int
    rollout_id: str
    attempt_id: str
    count: int = 0
    places: list[int] = field(default_factory=list)
    refs: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    explicit: dict[int, int] = field(default_factory=dict)
    calls: dict[int, CheckedCall] = field(default_factory=dict)
    rejected: list[tuple[int, bytes, StoreError]] = field(default_factory=list)
    open_calls: list[tuple[int, int]] = field(default_factory=list)
    abandoned: list[int] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether the group was rejected as a whole."""
        return bool(self.rejected) and self.rejected[0][0] == WHOLE_GROUP

    def refuse(self, error: StoreError) -> None:
        """Reject the group as a whole."""
        for column in (self.places, self.refs, self.starts, self.data):
            column.clear()
        self.rejected = [(WHOLE_GROUP, b"", error)]


def ref_of(span_id: bytes) -> int:
    """A span id as the signed integer by which it is stored."""
    return int.from_bytes(span_id, "big", signed=True)


def id_of(ref: int) -> bytes:
    """The span id of a stored integer."""
    return ref.to_bytes(8, "big", signed=True)


def check_group(group: Any, attempt_id: str, field: str, index: int, now_ns: int) -> CheckedGroup:
    """Check the spans of a RawAttemptSpans; bad ones are rejected alone.

    Args:
        group: The group.
        attempt_id: The attempt that it is for.
        field: The message's field that holds it.
        index: Its place there.
        now_ns: The store's time in nanoseconds.
    """
    checked = CheckedGroup(f"{field}[{index}]", index, group.rollout_id, attempt_id, len(group.spans))
    _check_spans(checked, group.spans, now_ns + _AHEAD_NS)
    if not attempt_id:
        checked.refuse(errors.invalid_field(f"{checked.path}.attempt_id", "is required"))
    if (group.open_calls or group.abandoned_calls) and not checked.refused:
        _check_announcements(checked, group)
    return checked


def _check_announcements(checked: CheckedGroup, group: Any) -> None:
    for name, announced in (("open_calls", group.open_calls), ("abandoned_calls", group.abandoned_calls)):
        if len(announced) > limits.BATCH_ITEMS:
            rule = f"has {len(announced)} items; at most {limits.BATCH_ITEMS} are allowed"
            checked.refuse(errors.invalid_field(f"{checked.path}.{name}", rule))
            return
    for number, call in enumerate(group.open_calls):
        if _is_announced(checked, call.span_id, f"open_calls[{number}].span_id"):
            checked.open_calls.append((ref_of(call.span_id), min(call.start_time_unix_nano, _MAX_SIGNED - 1)))
    for number, span_id in enumerate(group.abandoned_calls):
        if _is_announced(checked, span_id, f"abandoned_calls[{number}]"):
            checked.abandoned.append(ref_of(span_id))


def _is_announced(checked: CheckedGroup, span_id: bytes, name: str) -> bool:
    if len(span_id) == 8 and any(span_id):
        return True
    error = errors.invalid_field(f"{checked.path}.{name}", "must be 8 bytes, not all zero")
    checked.rejected.append((ANNOUNCEMENT, span_id, error))
    return False


def _check_spans(checked: CheckedGroup, spans: Sequence[bytes], latest: int) -> None:
    parse, number = span_pb2.Span.FromString, int.from_bytes
    places, refs, starts, column = checked.places, checked.refs, checked.starts, checked.data
    for place, data in enumerate(spans):
        span_id = b""
        try:
            # The whole span, not only its keys: bytes that do not parse would break every reader's page.
            span = parse(data)
            span_id = span.span_id
            start = span.start_time_unix_nano
            _check_span(span, span_id, data, start, latest)
            ref = number(span_id, "big", signed=True)
            explicit = span.explicit_sequence_id
            if explicit:
                checked.explicit[place] = explicit
            if span.HasField("model_call"):
                checked.calls[place], data = _check_model_call(span, data)
        except DecodeError:
            rule = "is not a span (broken bytes or text that is not UTF-8)"
            checked.rejected.append((place, b"", _named(errors.invalid_field("", rule), checked, place)))
        except StoreError as error:
            checked.rejected.append((place, span_id, _named(error, checked, place)))
        else:
            places.append(place)
            refs.append(ref)
            starts.append(start)
            column.append(data)


def _named(error: StoreError, group: CheckedGroup, place: int) -> StoreError:
    """The error with the field's whole path in place of its name within the span."""
    path = f"{group.path}.spans[{place}]"
    name = error.metadata["field"]
    full = f"{path}.{name}" if name else path
    return dataclasses.replace(
        error,
        message=f"{full} {error.message.removeprefix(name).lstrip()}",
        metadata={**error.metadata, "field": full},
    )


def _check_span(span: span_pb2.Span, span_id: bytes, data: bytes, start: int, latest: int) -> None:
    """Raises when a key or a time is not as it has to be."""
    if len(span_id) != 8 or span_id == _ZERO:
        raise errors.invalid_field("span_id", "must be 8 bytes, not all zero")
    end = span.end_time_unix_nano
    if not start <= end <= latest and (start > latest or end > latest or end):
        raise _time_problem(start, end, latest)
    name = span.name
    if not name or (len(name) > _MAX_NAME // 4 and len(name.encode()) > _MAX_NAME):
        raise errors.invalid_field("name", "must have 1 to 1024 bytes")
    if len(span.parent_span_id) not in _ID_LENGTHS:
        raise errors.invalid_field("parent_span_id", "must be empty or 8 bytes")
    if len(span.trace_id) not in _TRACE_LENGTHS:
        raise errors.invalid_field("trace_id", "must be empty or 16 bytes")
    if len(data) > _MAX_ATTRIBUTES:
        if len(data) > limits.SPAN_BYTES:
            raise errors.invalid_field("", f"has {len(data)} bytes, at most {limits.SPAN_BYTES} are taken")
        if len(span.attributes) > _MAX_ATTRIBUTES:
            raise errors.invalid_field("attributes", "are more than 1024")
    if not 0 <= span.explicit_sequence_id <= _MAX_EXPLICIT:
        raise errors.invalid_field("explicit_sequence_id", "must be from 0 to 2^62")


def _time_problem(start: int, end: int, latest: int) -> StoreError:
    if start > latest or end > latest:
        which = "start_time_unix_nano" if start > latest else "end_time_unix_nano"
        rule = "is negative or more than 24 hours ahead of the store's clock"
        return errors.invalid_field(which, rule)
    return errors.invalid_field("end_time_unix_nano", "is before the start")


def _check_model_call(span: span_pb2.Span, data: bytes) -> tuple[CheckedCall, bytes]:
    call = span.model_call
    raw_call = raw.RawSpan.FromString(data).model_call
    packed = len(raw_call.prompt.token_ids) == 4 * len(call.prompt.token_ids)
    for number, choice in enumerate(call.choices):
        bare = raw_call.choices[number]
        packed &= len(bare.token_ids) == 4 * len(choice.token_ids)
        packed &= len(bare.logprobs) == 4 * len(choice.logprobs)
        _check_choice(choice, bare, f"model_call.choices[{number}]", span.span_id, packed)
    if not packed:
        # Legal but unusual encodings of arrays are brought into the usual one, on which readers rely.
        data = span.SerializeToString()
    base, base_choice, base_length = _check_prompt(call.prompt, "model_call", span.span_id)
    return CheckedCall(len(call.prompt.token_ids), base, base_choice, base_length), data


def _check_choice(choice: model_call_pb2.Choice, bare: Any, path: str, span_id: bytes, packed: bool) -> None:
    count = len(choice.token_ids)
    if len(choice.logprobs) != count:
        rule = f"has {len(choice.logprobs)} numbers for {count} token_ids; one each is required"
        raise errors.tokens_malformed(f"{path}.logprobs", span_id, rule)
    logprobs = np.frombuffer(bare.logprobs, "<f4") if packed else np.array(choice.logprobs, "<f4")
    if not np.isfinite(logprobs).all():
        bad = int(np.argmin(np.isfinite(logprobs)))
        raise errors.tokens_malformed(f"{path}.logprobs[{bad}]", span_id, "is not a finite number")
    sizes = len(choice.kept_set_sizes)
    if sizes and sizes != count:
        rule = f"has {sizes} numbers for {count} token_ids; one each or none is required"
        raise errors.tokens_malformed(f"{path}.kept_set_sizes", span_id, rule)
    _check_policy_runs(choice, count, path, span_id)


def _check_policy_runs(choice: model_call_pb2.Choice, count: int, path: str, span_id: bytes) -> None:
    end = 0
    for number, run in enumerate(choice.policy_runs):
        if run.start != end or run.end < run.start or (run.end == run.start and count):
            rule = f"covers {run.start} to {run.end}; runs must follow each other without gaps from 0"
            raise errors.tokens_malformed(f"{path}.policy_runs[{number}]", span_id, rule)
        end = run.end
    if choice.policy_runs and end != count:
        rule = f"end at {end}; they must cover all {count} token_ids"
        raise errors.tokens_malformed(f"{path}.policy_runs", span_id, rule)


def _check_prompt(prompt: model_call_pb2.PromptTokens, path: str, span_id: bytes) -> tuple[int, int, int]:
    base = prompt.base_span_id
    if not base:
        if prompt.base_length or prompt.base_choice:
            rule = "is set without base_span_id"
            raise errors.tokens_malformed(f"{path}.prompt.base_length", span_id, rule)
        return 0, 0, 0
    if len(base) != 8 or base == span_id or not any(base):
        rule = "must be the 8-byte id of an earlier call"
        raise errors.tokens_malformed(f"{path}.prompt.base_span_id", span_id, rule)
    if prompt.base_length < 0 or prompt.base_choice < 0:
        rule = "and base_choice must not be negative"
        raise errors.tokens_malformed(f"{path}.prompt.base_length", span_id, rule)
    return ref_of(base), prompt.base_choice, prompt.base_length
