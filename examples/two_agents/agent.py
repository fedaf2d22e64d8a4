"""A planner and a solver: one makes a call of the calculator of a question, one an answer of its result.

Each is a model endpoint of its own, a resource by its name. They share the reward of the rollout.
"""

from __future__ import annotations

from openai.types.chat import ChatCompletionMessageParam

import agl_grpc
from agl_grpc import LLM, AttemptedRollout, NamedResources, ProxyLLM
from examples.calculator.agent import CALL, ask, final_answer, with_result
from examples.calculator.tasks import Task

AGENTS = ("planner", "solver")


@agl_grpc.rollout
async def agent(task: Task, resources: NamedResources, rollout: AttemptedRollout) -> float:
    """Answer a question; the reward is 1.0 or 0.0."""
    planner, solver = (_endpoint(resources[name], rollout) for name in AGENTS)
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


def _endpoint(resource: object, rollout: AttemptedRollout) -> LLM:
    assert isinstance(resource, LLM), "the training script publishes an endpoint for each agent"
    return resource.with_attempted_rollout(rollout) if isinstance(resource, ProxyLLM) else resource
