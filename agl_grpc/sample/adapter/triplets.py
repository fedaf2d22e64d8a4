"""Traces of agents as triplets."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from agl_grpc.model import gen_ai
from agl_grpc.model.span import Span
from agl_grpc.sample.adapter.attributes import first_nested
from agl_grpc.sample.adapter.base import TraceAdapter, Triplet, as_spans
from agl_grpc.sample.adapter.rewards import RewardMatchPolicy, match_rewards
from agl_grpc.sample.adapter.tree import CallRules, Node, build, find_calls, repair, response_id

log = logging.getLogger(__name__)

CAPTURED_SCOPE = "agl_grpc.interceptor"
"""Scope of the spans in which the interceptor records calls."""

_CAPTURED_NAME = r"^model_call "
_OUTPUT = "agentlightning.operation.output"
_INPUT = "agentlightning.operation.input"


class TracerTraceToTriplet(TraceAdapter[list[Triplet]]):
    """Spans of an attempt as one triplet for each call of a model, in the order of the calls.

    Args:
        repair_hierarchy: put spans that lost their parent into the tightest one that encloses them in time.
        llm_call_match: pattern that the names of calls contain. Where the interceptor has captured the calls,
            its spans, which have the exact tokens, are the calls instead.
        agent_match: pattern of the agents whose calls count; ``None`` = all calls.
        exclude_llm_call_in_reward: leave out calls that were made to find a reward.
        reward_match: how rewards find their calls.
        _skip_empty_token_spans: leave out calls without token ids.
    """

    def __init__(
        self,
        repair_hierarchy: bool = True,
        llm_call_match: str = r"openai\.chat\.completion",
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        reward_match: RewardMatchPolicy | str = RewardMatchPolicy.FIRST_OCCURRENCE,
        _skip_empty_token_spans: bool = False,
    ) -> None:
        self.repair_hierarchy = repair_hierarchy
        self.llm_call_match = llm_call_match
        self.agent_match = agent_match
        self.exclude_llm_call_in_reward = exclude_llm_call_in_reward
        self.reward_match = RewardMatchPolicy(reward_match)
        self._skip_empty = _skip_empty_token_spans

    def adapt(self, source: Sequence[Any], /) -> list[Triplet]:
        """The triplets; an attempt without spans has none."""
        spans = as_spans(source)
        if not spans:
            return []
        root = build(spans)
        if self.repair_hierarchy:
            repair(root)
        captured = any(span.scope_name == CAPTURED_SCOPE for span in spans)
        name = _CAPTURED_NAME if captured else self.llm_call_match
        rules = CallRules(name, self.agent_match, self.exclude_llm_call_in_reward)
        made = [(node, self.span_to_triplet(node.span, agent)) for node, agent in find_calls(root, rules)]
        if self._skip_empty:
            made = [(node, triplet) for node, triplet in made if _has_tokens(node, triplet)]
        rewards = match_rewards(root, self.reward_match, [node for node, _ in made])
        for node, triplet in made:
            triplet.reward = rewards.get(node.id)
        return [triplet for _, triplet in made]

    def span_to_triplet(self, span: Span, agent_name: str) -> Triplet:
        """One call as a triplet without reward. Subclasses may add to it."""
        attributes = span.attributes
        prompt_ids, response_ids = token_ids(span)
        request = first_nested(attributes, ("gen_ai.request", _INPUT))
        answer = first_nested(attributes, ("gen_ai.response", _OUTPUT))
        prompt = first_nested(attributes, ("gen_ai.prompt", f"{_INPUT}.messages"))
        response: dict[str, Any] = {
            "token_ids": response_ids,
            "raw_content": first_nested(attributes, ("gen_ai.completion", f"{_OUTPUT}.choices")),
        }
        logprobs = _logprobs(span)
        if logprobs is not None:
            response["logprobs"] = logprobs
        return Triplet(
            prompt={"token_ids": prompt_ids, "raw_content": prompt, "image_urls": image_urls(prompt)},
            response=response,
            metadata={
                "request": _without(request, "messages"),
                "response": _without(answer, "choices", "prompt_token_ids", "response_token_ids"),
                "response_id": response_id(attributes),
                "agent_name": agent_name,
            },
        )


def token_ids(span: Span) -> tuple[list[int], list[int]]:
    """Prompt and response of a call: captured ones, else those in the attributes, else empty lists."""
    call = span.model_call
    if call is not None and call.choices and span.scope_name == CAPTURED_SCOPE:
        return call.prompt_token_ids.tolist(), call.choices[0].token_ids.tolist()
    return gen_ai.prompt_token_ids(span.attributes), gen_ai.response_token_ids(span.attributes)


def _logprobs(span: Span) -> Any:
    """Whatever was recorded: captured numbers as objects with ``logprob``, or the attribute's JSON."""
    call = span.model_call
    if call is not None and call.choices and call.logprob_semantics is not None:
        return [{"logprob": value} for value in call.choices[0].logprobs.tolist()]
    text = span.attributes.get(gen_ai.LOGPROBS)
    return json.loads(text) if isinstance(text, str) else None


def _has_tokens(node: Node, triplet: Triplet) -> bool:
    found = bool(triplet.prompt["token_ids"] and triplet.response["token_ids"])
    if not found:
        log.warning("span %s (%s) has no token ids and is left out", node.id, node.span.name)
    return found


def _without(value: Any, *names: str) -> Any:
    return {k: v for k, v in value.items() if k not in names} if isinstance(value, dict) else value


def image_urls(prompt: Any) -> list[str]:
    """URLs of the images in a prompt's messages, in their order."""
    return [
        part["image_url"]["url"]
        for message in _messages(prompt)
        for part in _parts(message)
        if isinstance(part, Mapping)
        and part.get("type") == "image_url"
        and isinstance(part.get("image_url"), Mapping)
        and "url" in part["image_url"]
    ]


def _messages(prompt: Any) -> list[Any]:
    if isinstance(prompt, list):
        return prompt
    if not isinstance(prompt, dict):
        return []
    numbered = sorted((name for name in prompt if name.isdigit()), key=int)
    return [prompt[name] for name in numbered] if numbered else [prompt]


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError:  # plain text, the usual case
            return []
    return content if isinstance(content, list) else []
