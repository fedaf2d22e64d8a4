"""vLLM's sampling parameters of a captured call: what is imposed on them, and what is asked for besides."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from agl_grpc.interceptor.inside import core_logprobs
from agl_grpc.interceptor.sampling import IMPOSABLE


def capture_params(params: Any, imposed: Mapping[str, Any]) -> Any:
    """A copy of vLLM's sampling parameters that also yields each sampled token's logprob.

    What is `imposed` takes the place of what the agent asked for, as far as it is a number that concerns
    sampling; of two token limits the smaller one counts, as the context may have no room for the larger.
    """
    captured = copy.copy(params)
    if captured.logprobs is None:
        captured.logprobs = 0
        captured.extra_args = core_logprobs.wanted(captured.extra_args)
    for name, value in imposed.items():
        if name not in IMPOSABLE or not isinstance(value, int | float):
            continue
        if name == "max_tokens" and captured.max_tokens is not None:
            value = min(value, captured.max_tokens)
        setattr(captured, name, value)
    return captured
