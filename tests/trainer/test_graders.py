"""`Trainer(graders=…)`: rewards that graders give, for agents that give none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_grpc import Baseline, Trainer
from agl_grpc.trainer import TrainerError
from tests.grader import own_graders as own
from tests.trainer.graded_agent import says


def test_an_agent_without_rewards_is_graded(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=Baseline(), run_dir=tmp_path, graders={own.exact: 2.0, own.parts: 0.0})
    result = trainer.fit(says, [{"answer": "4", "say": "4"}, {"answer": "4", "say": "5"}])
    assert sorted(result.value.rewards.values()) == [0.0, 2.0]


def test_graders_that_are_none_are_refused() -> None:
    with pytest.raises(TrainerError, match="graders: there is no grader"):
        Trainer(graders=[])
