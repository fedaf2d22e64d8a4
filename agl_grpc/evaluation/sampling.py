"""How answers are sampled in an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agl_grpc.evaluation.errors import EvaluationError
from agl_grpc.model import LLM, NamedResources

_MOST_SEED = 2**31 - 1
# Seeds of neighbouring evaluations do not overlap: a prime above any number of samples.
_STRIDE = 1_000_003


@dataclass(frozen=True)
class Sampling:
    """Parameters of an evaluation's model calls, before those of the endpoint; training has its own.

    Attributes:
        temperature: 0 = the likeliest token.
        top_p: share of the probability that is sampled from; None = the endpoint's.
        max_tokens: longest answer of one call in tokens; None = the endpoint's.
        seed: from which each sample's request seed is made: the same seed asks the same questions. The engine
            answers the same as far as its arithmetic does not depend on what else it computes.
    """

    temperature: float = 1.0
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise EvaluationError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise EvaluationError(f"max_tokens is {self.max_tokens}; it must be 1 or more")
        if not 0 <= self.seed <= _MOST_SEED:
            raise EvaluationError(f"seed is {self.seed}; it must be 0 to {_MOST_SEED}")

    def parameters(self, sample: int) -> dict[str, Any]:
        """The request's parameters of the ``sample``-th answer (from 0) to each task."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        seed = (self.seed * _STRIDE + sample) % (_MOST_SEED + 1)
        return {name: value for name, value in given.items() if value is not None} | {"seed": seed}


def with_sampling(
    resources: NamedResources, endpoint: str, sampling: Sampling, sample: int
) -> NamedResources:
    """The resources with the endpoint of that name sampling so; others, such as a judge's, are kept."""
    found = resources.get(endpoint)
    if not isinstance(found, LLM):
        return resources
    parameters: Mapping[str, Any] = {**found.sampling_parameters, **sampling.parameters(sample)}
    return {**resources, endpoint: dataclasses.replace(found, sampling_parameters=dict(parameters))}
