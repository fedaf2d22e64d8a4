"""How answers are sampled in an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from agl_grpc.evaluation.errors import EvaluationError
from agl_grpc.model import LLM, NamedResources
from agl_grpc.model.rollout import seed_of

_MOST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """Parameters of an evaluation's model calls, before those of the endpoint; training has its own.

    Attributes:
        temperature: 0 = the likeliest token.
        top_p: share of the probability that is sampled from; None = the endpoint's.
        max_tokens: longest answer of one call in tokens; None = the endpoint's.
        seed: from which every rollout's seed is made, another for each sample of each task: answers with one
            seed in common would be drawn with the same random numbers, and one task would say no more than
            all. It reaches engines with capture (`ProxyLLM`). An engine answers the same to the same requests
            as far as its arithmetic does not depend on what else it computes.
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

    def parameters(self) -> dict[str, Any]:
        """Parameters of every request; the seed is the rollout's."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in given.items() if value is not None}

    def seed_of(self, digest: str, occurrence: int, sample: int) -> int:
        """The seed of one rollout: the same for the same task, wherever it stands in the dataset.

        Args:
            digest: of the task's content.
            occurrence: how many equal tasks come before it.
            sample: which answer to the task, from 0.
        """
        return seed_of(self.seed, digest, occurrence, sample)


def with_sampling(
    resources: NamedResources, endpoints: str | Collection[str], sampling: Sampling
) -> NamedResources:
    """The resources with the endpoints of these names sampling so; others, such as a judge's, are kept."""
    names = (endpoints,) if isinstance(endpoints, str) else endpoints
    found = {name: resources.get(name) for name in names}
    changed = {name: _sampling_so(llm, sampling) for name, llm in found.items() if isinstance(llm, LLM)}
    return {**resources, **changed}


def _sampling_so(llm: LLM, sampling: Sampling) -> LLM:
    # A seed of the endpoint's own would be every rollout's.
    own = {name: value for name, value in llm.sampling_parameters.items() if name != "seed"}
    return dataclasses.replace(llm, sampling_parameters={**own, **sampling.parameters()})
