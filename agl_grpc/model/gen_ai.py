"""Model calls in the attributes of spans: GenAI semantic conventions, and token ids where tracers put them.

Token ids have no standard name yet. Read here are the names under which AgentOps' and Weave's instrumentation
of Agent Lightning, its LLM proxy (LiteLLM) and vLLM's own tracing write them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from agl_grpc.model import semconv
from agl_grpc.v1 import model_call_pb2

MARK = b"token_ids"
"""Part of every name below: a serialised span without these bytes has no token ids."""

PROMPT_IDS = (
    "prompt_token_ids",
    "gen_ai.prompt.token_ids",
    "agentlightning.operation.output.prompt_token_ids",
    "llm.hosted_vllm.prompt_token_ids",
)
"""Attributes that may hold the prompt's token ids, the first one that does counts."""

RESPONSE_IDS = (
    "response_token_ids",
    "gen_ai.completion.0.token_ids",
    "agentlightning.operation.output.response_token_ids.0",
    "agentlightning.operation.output.choices.0.token_ids",
    "agentlightning.operation.output.choices.0.provider_specific_fields.token_ids",
    "llm.hosted_vllm.response_token_ids",
    "llm.hosted_vllm.choices",
)
"""Attributes that may hold the token ids of the first answer."""

RESPONSE_ID = ("gen_ai.response.id", "agentlightning.operation.output.id", "llm.hosted_vllm.id")
"""Attributes that may hold the engine's name of an answer."""

LOGPROBS = "logprobs.content"
"""JSON: one object with `logprob` for each token of the first answer."""

_MODEL = ("gen_ai.response.model", "gen_ai.request.model", "llm.hosted_vllm.model")
_FINISH = ("gen_ai.response.finish_reasons", "gen_ai.completion.0.finish_reason")
_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_COUNTS = ("top_k", "max_tokens", "seed")
_UNKNOWN = model_call_pb2.LOGPROB_SEMANTICS_UNSPECIFIED
_SEMANTICS = {
    "raw": model_call_pb2.LOGPROB_SEMANTICS_RAW,
    "processed": model_call_pb2.LOGPROB_SEMANTICS_PROCESSED,
}
_MOST_ID = 2**32 - 1

Attributes = Mapping[str, Any]


def prompt_token_ids(attributes: Attributes, names: Iterable[str] = PROMPT_IDS) -> list[int]:
    """The prompt's token ids; empty = none are there."""
    return next((ids for name in names if (ids := _ids(attributes, name))), [])


def response_token_ids(attributes: Attributes, names: Iterable[str] = RESPONSE_IDS) -> list[int]:
    """The token ids of the first answer; empty = none are there."""
    return next((ids for name in names if (ids := _ids(attributes, name))), [])


def response_id(attributes: Attributes) -> str | None:
    """The engine's name of the answer; None = not told."""
    return _first_text(attributes, RESPONSE_ID)


def model_call(attributes: Attributes) -> model_call_pb2.ModelCall | None:
    """The call that a span's attributes tell of; None when it has no token ids of both sides.

    It can be read, exported and turned into triplets. It is trained only where its span says as well which
    weights sampled it and of which distribution its logprobs are; else `untrainable_reason` names what is
    missing.
    """
    prompt, response = prompt_token_ids(attributes), response_token_ids(attributes)
    if not prompt or not response:
        return None
    logprobs = _logprobs(attributes.get(LOGPROBS), len(response))
    version = _policy_version(attributes)
    semantics = _SEMANTICS.get(str(attributes.get(semconv.LOGPROBS)), _UNKNOWN)
    runs = [] if version is None else [model_call_pb2.PolicyRun(end=len(response), policy_version=version)]
    return model_call_pb2.ModelCall(
        model=_first_text(attributes, _MODEL) or "",
        prompt=model_call_pb2.PromptTokens(token_ids=prompt),
        choices=[
            model_call_pb2.Choice(
                token_ids=response,
                logprobs=logprobs or [0.0] * len(response),
                finish_reason=_finish_reason(attributes),
                policy_runs=runs,
            )
        ],
        sampling=_sampling(attributes),
        logprob_semantics=semantics,
        outcome=model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE,
        untrainable_reason=_untrainable(bool(logprobs), version, semantics),
        mode=_first_text(attributes, (semconv.MODE,)) or "train",
        api=_api(attributes),
        request_id=response_id(attributes) or "",
        agent_name=_first_text(attributes, ("gen_ai.agent.name", "agent.name")) or "",
    )


def _policy_version(attributes: Attributes) -> int | None:
    """The optimiser step whose weights sampled; None = the span does not say."""
    value = attributes.get(semconv.POLICY_VERSION)
    if isinstance(value, str) and value.isdecimal() and len(value) < 19:
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if good else None


def _untrainable(logprobs: bool, version: int | None, semantics: int) -> str:
    if not logprobs:
        return "its span has no logprobs"
    if version is None:
        return f"its span does not say which weights sampled it: no version in {semconv.POLICY_VERSION}"
    if semantics == _UNKNOWN:
        return f"its span does not say of what its logprobs are: raw or processed in {semconv.LOGPROBS}"
    return ""


def _ids(attributes: Attributes, name: str) -> list[int]:
    """Token ids in a list, or in text that reads as one; of several answers the first one's."""
    value = attributes.get(name)
    if value is None:
        return _indexed(attributes, name)
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, list | tuple) and value:
        if isinstance(value[0], Mapping):
            value = value[0].get("token_ids")
        elif isinstance(value[0], list | tuple):
            value = value[0]
    return _checked(value)


def _indexed(attributes: Attributes, name: str) -> list[int]:
    """A list that was flattened into `name.0`, `name.1`, …"""
    values: list[Any] = []
    while (value := attributes.get(f"{name}.{len(values)}")) is not None:
        values.append(value)
    return _checked(values)


def _checked(value: Any) -> list[int]:
    """The value when it is a list of token ids, else an empty one."""
    if not isinstance(value, list | tuple):
        return []
    good = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= _MOST_ID for one in value)
    return list(value) if good else []


def _literal(text: str) -> Any:
    """JSON, or Python's own notation, which LiteLLM writes; None for what is neither."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _logprobs(text: Any, count: int) -> list[float]:
    """One log probability for each token; empty = there are none, or not as many as tokens."""
    content = _literal(text) if isinstance(text, str) else None
    if not isinstance(content, list) or len(content) != count:
        return []
    values = [entry.get("logprob") if isinstance(entry, Mapping) else None for entry in content]
    if not all(isinstance(value, int | float) and value == value and value <= 0 for value in values):
        return []
    # An impossible token is written as minus infinity; the contract's numbers are finite.
    return [max(float(value), -9999.0) for value in values if value is not None]


def _sampling(attributes: Attributes) -> model_call_pb2.SamplingParameters:
    sampling = model_call_pb2.SamplingParameters()
    for name in (*_SAMPLING, *_COUNTS):
        value = attributes.get(f"gen_ai.request.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name not in _COUNTS:
            setattr(sampling, name, float(value))
        elif isinstance(value, int) and abs(value) < 2**31:
            setattr(sampling, name, value)
    return sampling


def _finish_reason(attributes: Attributes) -> str:
    for name in _FINISH:
        value = attributes.get(name)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, str):
            return value
    return ""


def _api(attributes: Attributes) -> str:
    operation = attributes.get("gen_ai.operation.name")
    return {"chat": "chat.completions", "text_completion": "completions"}.get(str(operation), "")


def _first_text(attributes: Attributes, names: Iterable[str]) -> str | None:
    for name in names:
        value = attributes.get(name)
        if isinstance(value, str) and value:
            return value
    return None
