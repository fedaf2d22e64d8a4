"""An agent that asks two models, one call each, and is worth how varied what they say is."""

from __future__ import annotations

from typing import Any

import agl_grpc
from agl_grpc import AttemptedRollout, NamedResources, ProxyLLM
from examples.calculator.agent import ask

MODELS = ("planner", "solver")


@agl_grpc.rollout
async def agent(task: dict[str, Any], resources: NamedResources, rollout: AttemptedRollout) -> float:
    """Asks the planner, then the solver."""
    said = task["question"]
    for name in MODELS:
        llm = resources[name]
        assert isinstance(llm, ProxyLLM)
        assert llm.model == name
        said = await ask(llm.with_attempted_rollout(rollout), [{"role": "user", "content": said}])
    return len(set(said)) / 20
