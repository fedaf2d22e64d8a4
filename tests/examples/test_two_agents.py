"""The parts of the two agents that need no model: who is asked what, and what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_grpc import LLM, AttemptedRollout, NamedResources
from agl_grpc.algorithm.several import Served
from agl_grpc.model import Attempt
from examples.two_agents.agent import AGENTS, TeamTask, agent, solve
from examples.two_agents.train import algorithm
from tests.support.scripted_model import ScriptedModel

QUESTION = "What is 12 + 30?"
CALL = "<calc>12 + 30</calc>"


@pytest.mark.parametrize(
    ("planned", "solved", "expected"),
    [
        (CALL, "Answer: 42", "42"),
        (CALL, "No answer", None),
        (CALL, CALL, None),
        ("<calc>12 +</calc>", "Answer: 0", "0"),
        ("Answer: 12", "never asked", "12"),
        ("forty-two", "never asked", None),
    ],
)
async def test_the_planner_is_asked_first_and_the_solver_for_results(
    planned: str, solved: str, expected: str | None
) -> None:
    said = dict(zip(AGENTS, (planned, solved), strict=True))
    with ScriptedModel(lambda model, _: said[model]) as endpoint:
        planner, solver = (LLM(endpoint=endpoint.endpoint, model=name) for name in AGENTS)
        assert await solve(QUESTION, planner, solver) == expected
    asked = [("planner", QUESTION)]
    if planned.startswith("<calc>"):
        asked.append(("solver", "42" if planned == CALL else "error"))
    assert endpoint.calls == asked


async def test_each_finds_its_model_or_in_a_task_for_one_of_them_that_adapter_or_the_base() -> None:
    task: TeamTask = {"question": QUESTION, "answer": "42", "trained": "solver"}
    # Model "base" is asked for what the planner says.
    said = {"base": CALL, "planner": CALL, "solver": "Answer: 42"}
    rollout = AttemptedRollout(
        rollout_id="r", input=task, attempt=Attempt(rollout_id="r", attempt_id="a", sequence_id=1)
    )
    with ScriptedModel(lambda model, _: said[model]) as endpoint:
        own: NamedResources = {name: LLM(endpoint=endpoint.endpoint, model=name) for name in AGENTS}
        base: NamedResources = {"main_llm": LLM(endpoint=endpoint.endpoint, model="base")}
        for resources in (own, base):
            assert await agent.rollout_async(task, resources, rollout) == 1.0
    assert [model for model, _ in endpoint.calls] == ["planner", "solver", "base", "solver"]


def test_both_are_adapters_of_one_base_in_one_engine(tmp_path: Path) -> None:
    verl = algorithm(tmp_path / "model", 3, 7, 1e-3)
    assert verl.served() == [Served(str(tmp_path / "model"), "model", AGENTS)]
    assert [one.seed for one in verl.of_each_model().values()] == [7, 7]
