"""Limits of fields, checked before a handler sees a request. They are stated in the contract's comments.

What a type implies holds everywhere: enum values are known, counts and times are not negative, texts have no
NUL and at most so many bytes. The tables say what else, by field; `tests/contract/test_limits.py` holds them
against the comments. What must not be left out, and rules that need more than the field (does the run exist,
may the state change), are the handlers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from agl_grpc.store import limits
from agl_grpc.store.errors import invalid_field

Limit = TypeVar("Limit")

Check = Callable[[Any, str], None]
"""Checks a field's value; the text is the field's path. Raises StoreError."""

TEXT_BYTES = 4 << 10
"""Most bytes of a text that says nothing else."""

NOTES_BYTES = 1 << 20
"""Most bytes of a list of notes (metadata, statistics) in all."""

ITEMS = limits.BATCH_ITEMS
"""Most items of a list that says nothing else."""

_LABEL_REPEATED = 3
_LAST_SECOND = 253_402_300_799  # the end of the year 9999

_TEXTS: Mapping[str, int] = {
    **dict.fromkeys(
        ("Failure.message", "Failure.type", "Failure.detail"), limits.MESSAGE_BYTES
    ),  # cut instead
    "PromptTemplate.template": limits.PAYLOAD_BYTES,
    "LogLine.text": 16 << 10,
    "SpanFilter.name": 1024,
    **dict.fromkeys(("run_id", "rollout_id", "attempt_id", "group_id", "queue", "queues"), 128),
    **dict.fromkeys(("rollout_id_in", "rollout_ids", "attempt_ids", "group_ids", "group_id_in"), 128),
    **dict.fromkeys(("queue_in", "resources_id", "training_run_id", "batch_id", "batch_ids"), 128),
    **dict.fromkeys(("request_id", "name", "reward_name", "Label.key", "TrainingRun.algorithm"), 128),
    **dict.fromkeys(("grader_version", "RunGrader.version"), 128),
    **dict.fromkeys(("worker_id", "worker_ids", "session_id", "grader", "media_type"), 256),
    **dict.fromkeys(("trainer_id", "checkpoint_id", "engine_id", "engine_ids"), 256),
    **dict.fromkeys(("KeyValue.key", "Label.value", "Metric.name", "PreparePolicyVersionRequest.model"), 256),
}
"""Bytes of texts by field, or by message and field. Spans are checked elsewhere."""

_COUNTS: Mapping[str, int] = {
    "WorkRequest.queues": 100,
    "labels": 32,
    "Run.graders": 32,
    "WaitRolloutsRequest.group_ids": 1000,
    "ListRewardsRequest.rollout_ids": 1000,
    "PublishResourcesRequest.resources": 1000,
}
"""Most items by field, or by message and field."""

_NUMBERS: Mapping[str, tuple[int, int]] = {
    "priority": (-1000, 1000),
    "limit": (0, 1000),
    "max_attempts": (0, 1000),
    "max_redeliveries": (0, 1000),
}
"""Smallest and largest numbers by field."""

_SHORTEST = 1000  # a microsecond: the store counts no smaller times
_SECOND = 10**9
_DAY = 24 * 3600 * _SECOND
_LONGEST = 315_576_000_000 * _SECOND  # ten thousand years, as google.protobuf.Duration says

_DURATIONS: Mapping[str, tuple[int, int]] = {
    "WorkRequest.lease_duration": (_SECOND, 3600 * _SECOND),
    "IssueCredentialRequest.lifetime": (_SHORTEST, 365 * _DAY),
    **dict.fromkeys(("RolloutConfig.timeout", "unresponsive", "expire_after"), (_SHORTEST, _LONGEST)),
    **dict.fromkeys(("retention", "replay_retention", "seal_timeout"), (_SHORTEST, _LONGEST)),
    **dict.fromkeys(("grading_timeout", "deadline"), (_SHORTEST, _LONGEST)),
}
"""Shortest and longest durations by field, or by message and field, in nanoseconds."""

_BYTES: Mapping[str, int] = {"data": limits.PAYLOAD_BYTES, "lease_token": 64}
"""Most bytes of bytes fields that say so; others are checked where they are read."""

_UNCHECKED = frozenset({"AttemptSpans", "AnyValue"})
"""Messages whose fields have rules of their own."""


def check_request(request: Message) -> None:
    """Checks the fields of a request, those of the messages in it too.

    Raises:
        StoreError: INVALID_FIELD, naming the field's path.
    """
    _check_message(request, "")


def _check_message(message: Message, path: str) -> None:
    checks = _checks(message.DESCRIPTOR)
    for field, value in message.ListFields():
        check = checks.get(field.number)
        if check is not None:
            check(value, f"{path}.{field.name}" if path else field.name)


@cache
def _checks(descriptor: Descriptor) -> dict[int, Check]:
    """What is checked of a message, by the number of the field."""
    found = {field.number: _check_of(field) for field in descriptor.fields}
    return {number: check for number, check in found.items() if check is not None}


def _check_of(field: FieldDescriptor) -> Check | None:
    one = _check_one(field)
    if not _is_repeated(field):
        return one
    most = _limit(_COUNTS, field, ITEMS)
    kind = field.message_type
    notes = kind is not None and kind.name == "KeyValue"

    def check(values: Any, path: str) -> None:
        if len(values) > most:
            raise invalid_field(path, f"has {len(values)} items; at most {most} are allowed")
        if notes and sum(value.ByteSize() for value in values) > NOTES_BYTES:
            raise invalid_field(path, f"has more than {NOTES_BYTES} bytes in all")
        if one is not None:
            for index, value in enumerate(values):
                one(value, f"{path}[{index}]")

    return check


def _is_repeated(field: FieldDescriptor) -> bool:
    # protobuf 7 has no `label` any more, protobuf 5 has no `is_repeated` yet.
    repeated: bool | None = getattr(field, "is_repeated", None)
    return getattr(field, "label", 0) == _LABEL_REPEATED if repeated is None else repeated


def _check_one(field: FieldDescriptor) -> Check | None:
    if field.message_type is not None:
        return _check_submessage(field, field.message_type)
    if field.enum_type is not None:
        return _check_enum(field.enum_type)
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_STRING:
        return _check_text(_limit(_TEXTS, field, TEXT_BYTES))
    if field.type == FieldDescriptor.TYPE_BYTES and field.name in _BYTES:
        return _check_bytes(_BYTES[field.name])
    if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return _check_number(*_NUMBERS.get(field.name, (0, 2**63 - 1)))
    return None


def _limit(table: Mapping[str, Limit], field: FieldDescriptor, otherwise: Limit) -> Limit:
    full = ".".join(field.full_name.split(".")[-2:])
    return table.get(full, table.get(field.name, otherwise))


def _check_submessage(field: FieldDescriptor, descriptor: Descriptor) -> Check | None:
    if descriptor.full_name == "google.protobuf.Timestamp":
        return _check_timestamp
    if descriptor.full_name == "google.protobuf.Duration":
        return _check_duration(*_limit(_DURATIONS, field, (0, _LONGEST)))
    if descriptor.full_name.startswith("google.") or descriptor.name in _UNCHECKED:
        return None
    return _check_message


def _check_enum(kind: EnumDescriptor) -> Check:
    known = frozenset(kind.values_by_number)
    name = kind.name

    def check(value: int, path: str) -> None:
        if value not in known:
            raise invalid_field(path, f"is {value}, which is no {name}")

    return check


def _check_text(most: int) -> Check:
    quarter = most // 4

    def check(value: str, path: str) -> None:
        if len(value) > quarter and len(value.encode()) > most:
            raise invalid_field(path, f"has {len(value.encode())} bytes; at most {most} are allowed")
        if "\0" in value:
            raise invalid_field(path, "must not contain a NUL character")

    return check


def _check_bytes(most: int) -> Check:
    def check(value: bytes, path: str) -> None:
        if len(value) > most:
            raise invalid_field(path, f"has {len(value)} bytes; at most {most} are allowed")

    return check


def _check_number(least: int, most: int) -> Check:
    def check(value: int, path: str) -> None:
        if not least <= value <= most:
            rule = f"must be between {least} and {most}" if most < 2**63 - 1 else "must not be negative"
            raise invalid_field(path, rule)

    return check


def _check_timestamp(value: Any, path: str) -> None:
    if not 0 <= value.seconds <= _LAST_SECOND or not 0 <= value.nanos < 1_000_000_000:
        raise invalid_field(path, "must be a time between the years 1970 and 9999")


def _check_duration(least: int, most: int) -> Check:
    rule = "must not be negative"
    if least:
        rule = "must be longer than 0" if least == _SHORTEST else f"must be at least {least // _SECOND} s"
    rule += f" and at most {most // _SECOND} s"

    def check(value: Any, path: str) -> None:
        nanos = value.nanos if value.nanos < _SECOND else -1
        if nanos < 0 or not least <= value.seconds * _SECOND + nanos <= most:
            raise invalid_field(path, rule)

    return check
