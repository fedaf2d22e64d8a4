"""An agent of two: a planner and a solver, each a model of its own, answer one call each of a rollout."""

from __future__ import annotations

from typing import Any

import httpx

import agl_grpc
from agl_grpc.model import AttemptedRollout, NamedResources, ProxyLLM, Rollout

TARGET = 64
"""Tokens below this id are rewarded: the share of them is the reward."""
TURN = 4
OBSERVATION = [60, 61]


@agl_grpc.rollout
async def agent(task: dict[str, Any], resources: NamedResources, rollout: Rollout) -> float:
    """The planner begins, the solver goes on from what it said; both have the same reward."""
    assert isinstance(rollout, AttemptedRollout)
    sampled: list[int] = []
    prompt = [1, 5, 6, 7 + task["n"] % 3]
    async with httpx.AsyncClient(timeout=120) as client:
        for name in ("planner", "solver"):
            llm = resources[name]
            assert isinstance(llm, ProxyLLM)
            url = f"{llm.with_attempted_rollout(rollout).endpoint}/completions"
            body = {"model": name, "prompt": prompt, "max_tokens": TURN, "ignore_eos": True}
            answer = await client.post(url, json={**body, "return_token_ids": True})
            answer.raise_for_status()
            tokens = answer.json()["choices"][0]["token_ids"]
            sampled += tokens
            prompt = [*prompt, *tokens, *OBSERVATION]
    return sum(token < TARGET for token in sampled) / len(sampled)
