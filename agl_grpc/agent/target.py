"""Spans that a reward can be given to."""

from __future__ import annotations

import re
from typing import Any, Protocol

_HEX = re.compile(r"[0-9a-f]{16}")


class HasSpanId(Protocol):
    """A span with its id as 16 hex digits: `Span`, or an `operation` that is under way."""

    @property
    def span_id(self) -> str: ...


class HasSpanContext(Protocol):
    """A span of OpenTelemetry, open or ended."""

    def get_span_context(self) -> Any: ...


SpanTarget = str | HasSpanId | HasSpanContext


def span_id_of(target: SpanTarget) -> str:
    """The id (16 hex digits) of a span; `TypeError` for what is none, `ValueError` for an id that is none."""
    context = getattr(target, "get_span_context", None)
    if isinstance(target, str):
        span_id = target
    elif callable(context):
        span_id = f"{context().span_id:016x}"
    elif isinstance(found := getattr(target, "span_id", None), str):
        span_id = found
    else:
        raise TypeError(
            f"target is a {type(target).__name__}; pass a span, an operation, or a span's id as 16 hex digits"
        )
    if not _HEX.fullmatch(span_id) or not int(span_id, 16):
        raise ValueError(f"target {span_id!r} is no span id: 16 hex digits, not all 0")
    return span_id
