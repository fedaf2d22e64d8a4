"""Which spans of a rollout a query means, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from agl_grpc.model import raw
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.spans.check import MODEL_CALL
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks
from agl_grpc.v1 import common_pb2, store_service_pb2

COLUMNS = {"sequence_id": "sequence_id", "received_time": "received_time"}
"""Orders that the database sorts by itself."""

Sortable = tuple[bool, int | str]
"""A sort value with a flag that puts nulls last."""

_KEYS: dict[str, Callable[[Any], Sortable]] = {
    "start_time": lambda span: (False, span.start_time_unix_nano),
    "end_time": lambda span: (not span.end_time_unix_nano, span.end_time_unix_nano),
    "name": lambda span: (False, span.name),
    "trace_id": lambda span: (not span.trace_id, span.trace_id.hex()),
    "span_id": lambda span: (False, span.span_id.hex()),
    "parent_id": lambda span: (not span.parent_span_id, span.parent_span_id.hex()),
    "rollout_id": lambda _: (False, 0),  # one list is of one rollout
}

Test = Callable[[Any], bool]


def sort_name(order_by: str) -> str:
    """The order's name.

    Raises:
        StoreError: INVALID_FIELD for an unknown one.
    """
    name = order_by or "sequence_id"
    known = sorted([*COLUMNS, *_KEYS, "attempt_id"])
    if name not in known:
        raise invalid_field("order_by", f"must be one of {', '.join(known)}")
    return name


def tests_of(chosen: store_service_pb2.SpanFilter) -> list[Test]:
    """A filter's conditions on a span's keys, model_calls_only excepted."""
    tests: list[Test] = []
    for name in ("trace_id", "span_id", "parent_span_id"):
        if getattr(chosen, name):
            tests.append(partial(_equals, name, getattr(chosen, name)))
        if getattr(chosen, f"{name}_contains"):
            tests.append(partial(_contains, name, getattr(chosen, f"{name}_contains").lower()))
    if chosen.name:
        tests.append(lambda span: span.name == chosen.name)
    if chosen.name_contains:
        tests.append(lambda span: chosen.name_contains in span.name)
    return tests


def _equals(name: str, wanted: bytes, span: Any) -> bool:
    return bool(getattr(span, name) == wanted)


def _contains(name: str, part: str, span: Any) -> bool:
    return part in getattr(span, name).hex()


def scan(
    db: Connection,
    attempt_keys: Sequence[int],
    chosen: store_service_pb2.SpanFilter,
    order: str,
    descending: bool,
) -> list[int]:
    """Keys of all matching spans of some attempts, sorted; their bytes are looked into one by one."""
    tests = tests_of(chosen)
    combine = any if chosen.logic == common_pb2.FILTER_LOGIC_OR else all
    flags = MODEL_CALL if chosen.model_calls_only else 0
    ids = _attempt_ids(db, attempt_keys) if order == "attempt_id" else {}
    found: list[tuple[Sortable, int]] = []
    rows = db.execute(
        "SELECT span_key, attempt_key, sequence_id, received_time, data FROM spans "
        f"WHERE attempt_key IN ({marks(len(attempt_keys))}) AND flags & ? = ?",
        [*attempt_keys, flags, flags],
    )
    for key, attempt_key, sequence, received, data in rows:
        span = raw.RawSpanKeys.FromString(data)
        if tests and not combine(test(span) for test in tests):
            continue
        if order == "sequence_id":
            value: Sortable = (False, sequence)
        elif order == "received_time":
            value = (False, received)
        elif order == "attempt_id":
            value = (False, ids[attempt_key])
        else:
            value = _KEYS[order](span)
        found.append((value, key))
    found.sort(reverse=descending)
    return [key for _, key in found]


def _attempt_ids(db: Connection, attempt_keys: Sequence[int]) -> dict[int, str]:
    chosen = marks(len(attempt_keys))
    rows = db.execute(
        f"SELECT attempt_key, attempt_id FROM attempts WHERE attempt_key IN ({chosen})", attempt_keys
    )
    return {int(key): str(name) for key, name in rows}
