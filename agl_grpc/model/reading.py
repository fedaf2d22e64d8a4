"""Reads what agents emitted back out of their spans."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from agl_grpc.model import semconv
from agl_grpc.model.reward import PRIMARY, RewardKey

# Names under which other tracers wrote rewards.
_LEGACY_REWARD = "reward"
_AGENTOPS_OUTPUTS = ("agentops.task.output", "agentops.entity.output")


class SpanLike(Protocol):
    """Anything with a name and attributes: `Span`, `SpanCoreFields`, or a span of OpenTelemetry's SDK."""

    @property
    def name(self) -> str: ...
    @property
    def attributes(self) -> Any: ...


S = TypeVar("S", bound=SpanLike)


class NamedReward(NamedTuple):
    """One reward of a span; the first of a span is the one that counts."""

    name: str
    value: float


def get_rewards_from_span(span: SpanLike) -> list[NamedReward]:
    """All rewards that a span carries, the one that counts first; empty when it carries none."""
    attributes: Mapping[str, Any] = span.attributes or {}
    rewards: list[NamedReward] = []
    while (value := attributes.get(f"{semconv.REWARD}.{len(rewards)}.value")) is not None:
        name = attributes.get(f"{semconv.REWARD}.{len(rewards)}.name", PRIMARY)
        rewards.append(NamedReward(str(name), float(value)))
    if rewards:
        return rewards
    other = _other_reward(attributes)
    return [] if other is None else [NamedReward(PRIMARY, other)]


def get_reward_value(span: SpanLike) -> float | None:
    """The reward that counts of a span; ``None`` when it carries none, or only others by name."""
    rewards = get_rewards_from_span(span)
    return rewards[0].value if rewards and _first_counts(span) else None


def get_reward_step(span: SpanLike) -> int | None:
    """The step that a span's rewards judge, from 0; ``None`` = no single step."""
    step = (span.attributes or {}).get(semconv.REWARD_STEP)
    return None if step is None else int(step)


def get_reward_target(span: SpanLike) -> str | None:
    """The id (hex) of the span that a span's rewards judge; ``None`` = no single span."""
    target = (span.attributes or {}).get(semconv.REWARD_TARGET)
    return None if target is None else str(target)


def read_rewards(span: SpanLike) -> dict[RewardKey, float]:
    """A span's rewards by what they judge; the one that counts also under the name ``primary``."""
    named = get_rewards_from_span(span)
    if not named:
        return {}
    step, target = get_reward_step(span), get_reward_target(span)
    rewards = {RewardKey(name, step, target): value for name, value in named}
    if _first_counts(span):
        rewards[RewardKey(PRIMARY, step, target)] = named[0].value
    return rewards


def is_reward_span(span: SpanLike) -> bool:
    """Whether a span carries a reward."""
    return bool(get_rewards_from_span(span))


def find_reward_spans(spans: Iterable[S]) -> list[S]:
    """The spans that carry rewards, in their order."""
    return [span for span in spans if is_reward_span(span)]


def find_final_reward(spans: Iterable[SpanLike]) -> float | None:
    """The last reward of the whole attempt in list order; ``None`` when there is none.

    Rewards of a step or of a span are not rewards of the attempt.
    """
    final = RewardKey(PRIMARY)
    values = [rewards[final] for rewards in map(read_rewards, spans) if final in rewards]
    return values[-1] if values else None


def find_message_spans(spans: Iterable[S]) -> list[S]:
    """The spans that carry emitted messages, in their order; `get_message_value` reads one."""
    return [span for span in spans if get_message_value(span) is not None]


def find_object_spans(spans: Iterable[S]) -> list[S]:
    """The spans that carry emitted objects, in their order; `get_object_value` reads one."""
    return [span for span in spans if span.name == semconv.SPAN_OBJECT]


def get_message_value(span: SpanLike) -> str | None:
    """The text of an emitted message; ``None`` for other spans."""
    if span.name != semconv.SPAN_MESSAGE:
        return None
    body = (span.attributes or {}).get(semconv.MESSAGE_BODY)
    return None if body is None else str(body)


def get_object_value(span: SpanLike) -> Any:
    """The value of an emitted object; ``None`` for other spans."""
    if span.name != semconv.SPAN_OBJECT:
        return None
    attributes: Mapping[str, Any] = span.attributes or {}
    if semconv.OBJECT_JSON in attributes:
        return json.loads(attributes[semconv.OBJECT_JSON])
    literal = attributes.get(semconv.OBJECT_LITERAL)
    is_bytes = attributes.get(semconv.OBJECT_TYPE) == "bytes"
    return base64.b64decode(literal) if is_bytes and isinstance(literal, str) else literal


def _first_counts(span: SpanLike) -> bool:
    return (span.attributes or {}).get(semconv.REWARD_IS_PRIMARY) is not False


def _other_reward(attributes: Mapping[str, Any]) -> float | None:
    for key in _AGENTOPS_OUTPUTS:
        payload = _json_object(attributes.get(key))
        if payload.get("type") == "reward" and payload.get("value") is not None:
            return float(payload["value"])
    value = attributes.get(_LEGACY_REWARD)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _json_object(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        return {}
    try:
        value = json.loads(text)
    except ValueError:  # an agent's own text that is no JSON: no reward
        return {}
    return value if isinstance(value, dict) else {}
