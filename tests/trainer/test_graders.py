"""`Trainer(graders=…)`: rewards that graders give, for agents that give none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agl_grpc import Baseline, StoreClient, Trainer
from agl_grpc.algorithm import Reporter, algo
from agl_grpc.client.rollout_batch import primary_rewards, run_rollouts
from agl_grpc.model import EnqueueRolloutRequest, RolloutMode
from agl_grpc.trainer import TrainerError
from tests.grader import own_graders as own
from tests.trainer.graded_agent import says


@algo
async def rewarded(store: StoreClient, train_dataset: Sequence[Any], reporter: Reporter) -> list[float]:
    """Has every task done once; what each was worth."""
    requests = [EnqueueRolloutRequest(input=task, mode=RolloutMode.TRAIN) for task in train_dataset]
    done = {rollout.rollout_id: rollout async for rollout in run_rollouts(store, requests, label="graded")}
    rewards = await primary_rewards(store, [*done.values()])
    found = [rewards[f"graded.{place}"] for place in range(len(requests))]
    reporter.step(1, {"reward/mean": sum(found) / len(found)})
    return found


def test_an_agent_without_rewards_is_graded(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=Baseline(), run_dir=tmp_path, graders={own.exact: 2.0, own.parts: 0.0})
    result = trainer.fit(says, [{"answer": "4", "say": "4"}, {"answer": "4", "say": "5"}])
    assert sorted(result.value.rewards.values()) == [0.0, 2.0]


def test_an_algorithm_that_is_a_function_gets_the_graders_verdicts(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=rewarded, run_dir=tmp_path, graders={own.exact: 2.0, own.parts: 0.5})
    result = trainer.fit(says, [{"answer": "4", "say": "4"}, {"answer": "4", "say": "5"}])
    assert result.value == [2.25, 0.25]
    assert [step.metrics["reward/mean"] for step in result.history] == [1.25]


def test_graders_that_are_none_are_refused() -> None:
    with pytest.raises(TrainerError, match="graders: there is no grader"):
        Trainer(graders=[])
