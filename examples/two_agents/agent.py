"""A planner and a solver: one makes a call of the calculator of a question, one an answer of its result.

Each is a model of its own, which the agent finds under its name. They share the reward of the rollout.
"""

from __future__ import annotations

import dataclasses

from openai.types.chat import ChatCompletionMessageParam

import agl_grpc
from agl_grpc import LLM, AttemptedRollout, NamedResources, ProxyLLM
from examples.calculator.agent import CALL, ask, final_answer, with_result
from examples.calculator.tasks import Task

AGENTS = ("planner", "solver")
BASE = "main_llm"


class TeamTask(Task, total=False):
    """A question, and where only one of the two shall answer it as trained, which."""

    trained: str


@agl_grpc.rollout
async def agent(task: TeamTask, resources: NamedResources, rollout: AttemptedRollout) -> float:
    """Answer a question; the reward is 1.0 or 0.0."""
    planner, solver = (_endpoint(name, task, resources, rollout) for name in AGENTS)
    return 1.0 if await solve(task["question"], planner, solver) == task["answer"] else 0.0


async def solve(question: str, planner: LLM, solver: LLM) -> str | None:
    """The final answer: the planner's own, or the solver's where the planner calls the calculator.

    None = there is none.
    """
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    text = await ask(planner, messages)
    if call := CALL.fullmatch(text):
        text = await ask(solver, messages + with_result(text, call[1]))
    return final_answer(text)


def _endpoint(name: str, task: TeamTask, resources: NamedResources, rollout: AttemptedRollout) -> LLM:
    """The endpoint of one of the two: its own, or of the base the adapter of its name or none."""
    resource = resources.get(name, resources.get(BASE))
    assert isinstance(resource, LLM), "an endpoint is published for each agent, or one for the base"
    if name not in resources and task["trained"] == name:
        resource = dataclasses.replace(resource, model=name)
    return resource.with_attempted_rollout(rollout) if isinstance(resource, ProxyLLM) else resource
