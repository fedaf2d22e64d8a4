"""Which sampling a request asks of the engine, and what a record may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from agl_grpc.interceptor.capture.record import key_value
from agl_grpc.interceptor.sampling import sampling_message, untrainable_reasons
from agl_grpc.v1 import model_call_pb2

_NEUTRAL: dict[str, object] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Stated in training calls, so that no default of the model's generation config applies in silence."""

_FIELDS = (*_NEUTRAL, "max_tokens", "seed", "n")
_NUMBERS = (*_FIELDS, "min_tokens", "thinking_token_budget")
_OTHERS = ("logit_bias", "bad_words", "allowed_token_ids")
_GRAMMARS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


def impose(body: dict[str, Any], mode: str, imposed: Mapping[str, Any], *, explicit: bool) -> dict[str, Any]:
    """Put what is imposed into the request; what the agent had asked for instead.

    `explicit` also states the neutral values of what a training call leaves open.
    """
    replaced = {name: body[name] for name, value in imposed.items() if body.get(name, value) != value}
    body.update(imposed)
    if explicit and mode == "train":
        for name, value in _NEUTRAL.items():
            if body.get(name) is None:
                body[name] = value
    return replaced


def describe(
    body: Mapping[str, Any], replaced: Mapping[str, Any]
) -> tuple[model_call_pb2.SamplingParameters, list[str]]:
    """The sampling in force as the contract records it, and why it cannot be trained.

    What the request does not state is not known here and is left open. Raises TypeError or ValueError for
    values of a wrong type.
    """
    values: dict[str, Any] = {name: body.get(name) for name in (*_NUMBERS, *_OTHERS)}
    values["max_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
    values["structured_outputs"] = _grammar(body)
    stated = {name: value for name, value in values.items() if value is not None}
    stated.setdefault("temperature", None)
    reasons = untrainable_reasons(SimpleNamespace(**stated))
    if body.get("use_beam_search"):
        reasons.append("beam search")
    params = SimpleNamespace(**{**dict.fromkeys(_FIELDS), **stated})
    message = sampling_message(params, params)
    for name, value in replaced.items():
        message.other.append(key_value(f"requested.{name}", value))
    return message, reasons


def _grammar(body: Mapping[str, Any]) -> str | None:
    """What constrains the answer beyond the model's own distribution, in a word."""
    shape = body.get("response_format")
    if isinstance(shape, dict) and shape.get("type") not in (None, "text"):
        return f"response_format {shape.get('type')}"
    for name in _GRAMMARS:
        if body.get(name) is not None:
            return name
    choice = body.get("tool_choice")
    return "tool_choice" if choice == "required" or isinstance(choice, dict) else None
