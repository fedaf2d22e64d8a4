"""What adapters have in common, and the triplet that most of them make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from agl_grpc.model.otel import span_from_readable
from agl_grpc.model.span import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_from = TypeVar("T_from")
T_to = TypeVar("T_to")


@dataclass(slots=True, kw_only=True)
class Triplet:
    """One call of a model as a transition: what it was given, what it answered, what that was worth.

    ``prompt`` and ``response`` are dicts with ``token_ids`` (lists of int) and, where the trace has them,
    ``raw_content``, ``image_urls`` and ``logprobs``. ``reward`` is ``None`` when no reward was matched.
    """

    prompt: Any
    response: Any
    reward: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Adapter(Generic[T_from, T_to]):
    """Turns data of one form into another; calling it is the same as `adapt`."""

    def __call__(self, source: T_from, /) -> T_to:
        """As `adapt`."""
        return self.adapt(source)

    def adapt(self, source: T_from, /) -> T_to:
        """The data in the other form. Subclasses define it."""
        raise TypeError(f"{type(self).__name__} does not define adapt(source)")


class TraceAdapter(Adapter[Sequence[Any], T_to]):
    """An adapter of the spans of one attempt: `Span` objects, or finished spans of OpenTelemetry's SDK."""


class OtelTraceAdapter(Adapter[Sequence["ReadableSpan"], T_to]):
    """An adapter of finished spans of OpenTelemetry's SDK."""


def as_spans(source: Iterable[Any]) -> list[Span]:
    """Spans of either kind as `Span` objects, in their order."""
    return [span if isinstance(span, Span) else _from_readable(span) for span in source]


def _from_readable(span: ReadableSpan) -> Span:
    return Span.from_span_proto(span_from_readable(span), rollout_id="", attempt_id="")
