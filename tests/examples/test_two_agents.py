"""The parts of the two agents that need no model: who is asked what, and what the learners are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_grpc import LLM
from agl_grpc.learner.run_config import from_mapping
from examples.two_agents.agent import AGENTS, solve
from examples.two_agents.train import TEAMS, Settings, learner_configurations
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


def test_the_learners_share_their_rollouts_and_train_one_adapter_each(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    wanted = learner_configurations(Settings(tmp_path, steps=3, seed=7), tmp_path, "run", tasks)
    planner, solver = (from_mapping(wanted[name]) for name in AGENTS)
    assert planner.followers == ("solver",)
    assert solver.follows == planner.training_run_id == "run-planner"
    assert (planner.model.name, solver.model.name) == AGENTS
    assert planner.model.path == solver.model.path
    # Else they would not come by the same rollouts.
    assert (planner.seed, planner.verl) == (solver.seed, solver.verl)
    assert planner.verl["actor_rollout_ref.model.lora_rank"] > 0


def test_each_adapter_is_judged_alone_and_with_the_other() -> None:
    assert {frozenset(team) for team in TEAMS.values()} == {
        frozenset(),
        frozenset({"planner"}),
        frozenset({"solver"}),
        frozenset(AGENTS),
    }
