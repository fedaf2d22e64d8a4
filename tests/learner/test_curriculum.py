"""What the store knows of tasks, and what of a failed step is forgotten; without verl."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.client import StoreClient
from agl_grpc.dataset import CurriculumRules, task_key
from agl_grpc.learner.rollouts.curriculum import TaskOrder, begin_with, stored_rewards
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model import EnqueueRolloutRequest, Reward, RolloutMode
from tests.support.store_process import StoreProcess

RULES = CurriculumRules(enabled=True)
TASKS = [{"q": "1 + 1"}, {"q": "2 + 2"}, {"q": "never tried"}]


class Tasks:
    """As the learner's dataset."""

    def __len__(self) -> int:
        return len(TASKS)

    def task(self, index: int) -> Any:
        return TASKS[index]


class Groups:
    """Rewards by group, as the manager keeps them."""

    def __init__(self, **rewards: list[float]) -> None:
        self.rewards = rewards

    def take_rewards(self, uid: str) -> list[float]:
        return self.rewards.pop(uid, [])


def order(**rewards: list[float]) -> TaskOrder:
    return TaskOrder(RULES, len(TASKS), 0, Groups(**rewards))  # type: ignore[arg-type]  # only asked for rewards


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with StoreProcess(tmp_path / "store.db") as store:
        yield store.address


async def _fill(address: str) -> None:
    """A run in which the first task was solved once of twice, the second never; and what does not count."""
    async with StoreClient(address, run_id="earlier") as client:
        await client.create_run("earlier")
        for task, value, mode in (
            ({"q": " 1 +  1"}, 1.0, RolloutMode.TRAIN),
            (TASKS[0], 0.0, RolloutMode.TRAIN),
            (TASKS[0], 0.0, RolloutMode.VAL),
            (TASKS[1], 0.5, RolloutMode.TRAIN),
            (TASKS[2], None, RolloutMode.TRAIN),
        ):
            await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=task, mode=mode)])
            taken = await client.dequeue_rollout(worker_id="w")
            assert taken is not None
            attempt = taken.attempt.attempt_id
            if value is not None:
                wanted = Reward(rollout_id=taken.rollout_id, attempt_id=attempt, value=value)
                await client.put_rewards([wanted])
            await client.update_attempt(taken.rollout_id, attempt, status="succeeded")


def test_rates_begin_with_the_rewards_of_the_same_tasks_in_the_store(address: str) -> None:
    asyncio.run(_fill(address))
    link = StoreLink(address, "default")
    try:
        found = stored_rewards(link, ["*"])
        assert stored_rewards(link, []) == stored_rewards(link, ["default"]) == {}
    finally:
        link.close()
    assert {key: sorted(values) for key, values in found.items()} == {
        task_key(TASKS[0]): [0.0, 1.0],
        task_key(TASKS[1]): [0.5],
    }
    made = order()
    assert begin_with(made, Tasks(), found) == 2
    assert [made.curriculum.rate(task) for task in range(3)] == [0.5, 0.0, None]


def test_a_step_that_failed_does_not_count_and_the_ones_before_do() -> None:
    made = order(a=[1.0, 1.0], b=[0.0], c=[0.0, 0.0], d=[1.0])
    made.begin_step()
    made.settle({"a": (0, 0)}, True)
    made.begin_step()
    state = made.curriculum.state()
    made.settle({"b": (1, 0)}, True)
    made.settle({"c": (2, 1), "d": (3, 0)}, True)
    assert made.curriculum.rate(1) == 0.0
    made.put_back()
    assert made.curriculum.state() == state
    assert made.curriculum.rate(0) == 1.0
