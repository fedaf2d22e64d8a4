"""Which distribution a call samples from, and whether that one can be trained."""

from __future__ import annotations

from typing import Any

from agl_grpc.interceptor.capture.record import key_value
from agl_grpc.v1 import model_call_pb2

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None, []),
}
"""Sampling parameters that reshape the distribution, with the values by which they do nothing."""
IMPOSABLE = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "max_tokens",
        "min_tokens",
        "seed",
    }
)
"""Sampling parameters that a resource may set for every call."""


def untrainable_reasons(params: Any) -> list[str]:
    """Why tokens sampled with these parameters cannot be trained on; empty when they can.

    A trainer recomputes the softmax at one temperature: every other reshaping makes its ratios wrong.
    """
    reasons = [
        f"sampled with {name}={_short(getattr(params, name))}"
        for name, neutral in _NEUTRAL.items()
        if getattr(params, name, neutral[0]) not in neutral
    ]
    if params.temperature == 0:
        reasons.insert(0, "greedy (temperature=0)")
    return reasons


def sampling_message(params: Any, asked: Any) -> model_call_pb2.SamplingParameters:
    """Sampling in force, as the contract records it; what was overridden stands under ``requested.…``."""
    message = model_call_pb2.SamplingParameters(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_tokens=params.max_tokens,
        seed=params.seed,
        n=params.n,
    )
    for name in sorted(IMPOSABLE):
        wanted = getattr(asked, name, None)
        if wanted is not None and wanted != getattr(params, name, None):
            message.other.append(key_value(f"requested.{name}", wanted))
    named = set(message.DESCRIPTOR.fields_by_name)
    for name, neutral in _NEUTRAL.items():
        value = getattr(params, name, neutral[0])
        if name not in named and value not in neutral:
            message.other.append(key_value(name, _short(value)))
    return message


def _short(value: object) -> object:
    """Simple values as they are, others as text of bounded length."""
    return value if isinstance(value, int | float) else str(value)[:200]
