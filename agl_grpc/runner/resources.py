"""Resources as one attempt sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from agl_grpc.agent import PublishedResources
from agl_grpc.model import LLM, AttemptedRollout, NamedResources, ProxyLLM, Resource


@dataclass(slots=True, kw_only=True)
class AttemptLLM(ProxyLLM):
    """A `ProxyLLM` whose endpoint already names the attempt, so that every way of using it is attributed."""

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """The attempt's URL, whichever ids are given."""
        return self.endpoint

    def with_attempted_rollout(self, rollout: AttemptedRollout) -> LLM:
        """A plain `LLM` of the same endpoint."""
        return LLM(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LLM)})


def bind_to_attempt(resources: Mapping[str, Resource], rollout: AttemptedRollout) -> NamedResources:
    """Gives each `ProxyLLM` the attempt's URL and, without a key of its own, the attempt's credential."""
    return PublishedResources(
        (name, _bind(resource, rollout) if isinstance(resource, ProxyLLM) else resource)
        for name, resource in resources.items()
    )


def _bind(resource: ProxyLLM, rollout: AttemptedRollout) -> AttemptLLM:
    plain = resource.with_attempted_rollout(rollout)
    return AttemptLLM(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(LLM)})
