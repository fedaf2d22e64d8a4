"""What an agent's return value and its emitted rewards mean."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan

from agl_grpc.model import Failure, Span, SpanCoreFields
from agl_grpc.model.otel import span_from_readable
from agl_grpc.model.reading import SpanLike, read_rewards
from agl_grpc.model.reward import NAME_BYTES, PRIMARY, RewardKey
from agl_grpc.v1 import span_pb2

_ALLOWED = "None, a number, a dict of named numbers, or a list of spans"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How an attempt ended by itself."""

    failure: Failure | None = None
    """Why it failed; None = it succeeded."""
    returned: dict[str, float] = field(default_factory=dict)
    """Rewards that the agent returned, by name."""
    spans: list[span_pb2.Span] = field(default_factory=list)
    """Spans that the agent returned, to be stored before the attempt is completed."""
    last_spans: list[bytes] = field(default_factory=list)
    """The end of the attempt's trace, where the executor left it to be stored with the completion."""
    output: Any = None
    """What the attempt left beside rewards and spans, kept as its metadata; JSON values."""
    rewards: dict[RewardKey, float] = field(default_factory=dict)
    """All rewards of the attempt: emitted ones, and those of returned spans; the last of each key."""

    def read_rewards(self, spans: Iterable[SpanLike]) -> None:
        """Adds the rewards that spans carry; of each key the last one counts."""
        for span in spans:
            self.rewards.update(read_rewards(span))


class BadResult(TypeError):
    """The agent returned what no reward and no trace can be made of."""


def read_result(result: Any) -> Outcome:
    """Turns what the agent returned into rewards and spans.

    Raises:
        BadResult: another type, NaN, an infinity, or a reward without a name.
    """
    if result is None:
        return Outcome()
    if isinstance(result, Outcome):
        return result
    if _is_number(result):
        return Outcome(returned={PRIMARY: _finite(result, "the reward that the agent returned")})
    if isinstance(result, Mapping):
        return Outcome(returned=dict(_named_reward(name, value) for name, value in result.items()))
    if isinstance(result, Sequence) and not isinstance(result, str | bytes | bytearray):
        outcome = Outcome(spans=[_span(element, index) for index, element in enumerate(result)])
        _read_span_rewards(outcome, result)
        return outcome
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise BadResult(
            f"the agent returned a {type(result).__name__}, which nobody awaited or ran through; "
            f"declare the agent with `async def`, or return {_ALLOWED}"
        )
    raise BadResult(f"the agent returned a {type(result).__name__}; it may return {_ALLOWED}")


def _read_span_rewards(outcome: Outcome, spans: Sequence[Any]) -> None:
    try:
        outcome.read_rewards(spans)
    except (TypeError, ValueError) as error:
        raise BadResult(f"the agent returned a span with a reward that is none: {error}") from error
    for key, value in outcome.rewards.items():
        _finite(value, f"the reward {key.name!r} of a span that the agent returned")


def _is_number(value: Any) -> bool:
    # numpy scalars and 0-dimensional tensors are numbers to their users.
    return isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "item"))


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise BadResult(f"{what} is {number}; rewards must be finite")
    return number


def _named_reward(name: Any, value: Any) -> tuple[str, float]:
    if not isinstance(name, str) or not name or len(name.encode(errors="replace")) > NAME_BYTES:
        raise BadResult(
            f"the agent returned a reward named {name!r}; names are texts of 1 to {NAME_BYTES} bytes"
        )
    if not _is_number(value):
        raise BadResult(
            f"the reward {name!r} that the agent returned is a {type(value).__name__}, not a number"
        )
    return name, _finite(value, f"the reward {name!r} that the agent returned")


def _span(element: Any, index: int) -> span_pb2.Span:
    try:
        match element:
            case Span():
                return element.to_proto()
            case SpanCoreFields():
                # Rollout and attempt go with the message, not with the span.
                return Span.from_core_fields(element, rollout_id="", attempt_id="").to_proto()
            case ReadableSpan():
                return span_from_readable(element)
    except (TypeError, ValueError) as error:
        raise BadResult(f"the agent returned a list whose element {index} is no span: {error}") from error
    raise BadResult(
        f"the agent returned a list whose element {index} is a {type(element).__name__}, not a span; "
        f"it may return {_ALLOWED}"
    )
