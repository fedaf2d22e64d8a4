"""What an LLM proxy traced as triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from agl_grpc.model import gen_ai
from agl_grpc.model.reading import get_reward_value
from agl_grpc.model.span import Span
from agl_grpc.sample.adapter.base import TraceAdapter, Triplet, as_spans
from agl_grpc.sample.adapter.triplets import CAPTURED_SCOPE, token_ids

_RAW_PROMPT = ("llm.hosted_vllm.prompt_token_ids",)
_RAW_RESPONSE = ("llm.hosted_vllm.response_token_ids", "llm.hosted_vllm.choices")
_IDS = ("gen_ai.response.id", "llm.hosted_vllm.id")


class _Call(NamedTuple):
    """A call with the tokens of both sides."""

    span: Span
    prompt: list[int]
    response: list[int]
    response_id: str | None


class LlmProxyTraceToTriplet(TraceAdapter[list[Triplet]]):
    """Spans of an LLM proxy as triplets, ordered and matched by sequence id alone.

    Proxy and agent may run on machines whose clocks differ, so times decide nothing. A call counts when it
    has token ids of both sides: spans named ``raw_gen_ai_request`` or ``litellm_request``, and those of the
    interceptor. A reward goes to the last call before it that has none yet.
    """

    def adapt(self, source: Sequence[Any], /) -> list[Triplet]:
        """The triplets; an attempt without calls has none."""
        spans = sorted(as_spans(source), key=lambda span: (span.sequence_id, span.start_time_ns))
        calls: list[_Call] = []
        seen: set[str] = set()
        for span in spans:
            call = _call_of(span)
            if call is None or (call.response_id and call.response_id in seen):
                continue
            if call.response_id:
                seen.add(call.response_id)
            calls.append(call)
        rewards = _match(spans, calls)
        return [
            Triplet(
                prompt={"token_ids": call.prompt},
                response={"token_ids": call.response},
                reward=rewards.get(call.span.span_id),
                metadata={"response_id": call.response_id},
            )
            for call in calls
        ]


def _call_of(span: Span) -> _Call | None:
    attributes = span.attributes
    if span.scope_name == CAPTURED_SCOPE:
        prompt, response = token_ids(span)
    elif span.name == "raw_gen_ai_request":
        prompt = gen_ai.prompt_token_ids(attributes, _RAW_PROMPT)
        response = gen_ai.response_token_ids(attributes, _RAW_RESPONSE)
    elif span.name == "litellm_request":
        prompt = gen_ai.prompt_token_ids(attributes, ("prompt_token_ids",))
        response = gen_ai.response_token_ids(attributes, ("response_token_ids",))
    else:
        return None
    if not prompt or not response:
        return None
    name = next((attributes[key] for key in _IDS if attributes.get(key)), None)
    return _Call(span, prompt, response, name if isinstance(name, str) else None)


def _match(spans: Sequence[Span], calls: Sequence[_Call]) -> dict[str, float]:
    rewards: dict[str, float] = {}
    for span in spans:
        value = get_reward_value(span)
        if value is None:
            continue
        for call in reversed(calls):
            if call.span.span_id not in rewards and call.span.sequence_id < span.sequence_id:
                rewards[call.span.span_id] = value
                break
    return rewards
