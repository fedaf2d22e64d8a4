"""What an agent's return value means."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.model.failure import Failure

PRIMARY = "primary"
"""Name of the reward that a plain number stands for."""

_ALLOWED = "None, a number, a dict of named numbers, or a list of spans"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How an attempt ended by itself."""

    failure: Failure | None = None
    """Why it failed; None = it succeeded."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Rewards by name, all finite."""
    spans: list[Any] = field(default_factory=list)
    """Spans that the agent returned, to be stored before the attempt is completed."""


class BadResult(TypeError):
    """The agent returned what no reward and no trace can be made of."""


def read_result(result: Any) -> Outcome:
    """Turns what the agent returned into rewards and spans.

    Raises:
        BadResult: another type, NaN, an infinity, or a reward without a name.
    """
    if result is None:
        return Outcome()
    if _is_number(result):
        return Outcome(rewards={PRIMARY: _finite(result, "the reward")})
    if isinstance(result, Mapping):
        return Outcome(rewards=dict(_named_reward(name, value) for name, value in result.items()))
    if isinstance(result, Sequence) and not isinstance(result, str | bytes | bytearray):
        return Outcome(spans=[_span(element, index) for index, element in enumerate(result)])
    raise BadResult(f"the agent returned a {type(result).__name__}; it may return {_ALLOWED}")


def _is_number(value: Any) -> bool:
    # numpy scalars and 0-dimensional tensors are numbers to their users.
    return isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "item"))


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise BadResult(f"{what} is {number}; rewards must be finite")
    return number


def _named_reward(name: Any, value: Any) -> tuple[str, float]:
    if not isinstance(name, str) or not name or len(name.encode()) > 128:
        raise BadResult(f"the agent returned a reward named {name!r}; names are texts of 1 to 128 bytes")
    if not _is_number(value):
        raise BadResult(f"the agent returned a {type(value).__name__} as reward {name!r}; it must be a number")
    return name, _finite(value, f"reward {name!r}")


def _span(element: Any, index: int) -> Any:
    if hasattr(element, "to_proto") or hasattr(element, "get_span_context") or hasattr(element, "span_id"):
        return element
    raise BadResult(
        f"the agent returned a list whose element {index} is a {type(element).__name__}, not a span; "
        f"it may return {_ALLOWED}"
    )
