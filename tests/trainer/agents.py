"""Agents and algorithms that the tests hand to `Trainer`, here so that worker processes can import them."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from agl_grpc import Hook, LitAgent, NamedResources, PromptTemplate, StoreClient, rollout
from agl_grpc.algorithm import Algorithm, Reporter, algo
from agl_grpc.model import RolloutMode


@rollout
def halver(task: Any, resources: NamedResources) -> float:
    """Half the number that it is given; fails for negative ones."""
    if task["number"] < 0:
        raise ValueError("negative numbers cannot be halved")
    return float(task["number"]) / 2


@rollout
def own_process(task: Any, resources: NamedResources) -> float:
    """1 where it runs in the process of isolation ``process``, which leads a session; the worker does not."""
    return float(os.getsid(0) == os.getpid())


class Exiting(LitAgent[Any]):
    """Halves, after the first attempt has ended its worker's process."""

    def rollout(self, task: Any, resources: NamedResources, rollout: Any) -> float:
        """Half the number."""
        if rollout.attempt.sequence_id == 1:
            os._exit(task["exit"])
        return float(task["number"]) / 2


@rollout
def prompted(task: str, prompt_template: PromptTemplate) -> float:
    """The length of the prompt."""
    return float(len(prompt_template.format(task=task)))


@algo
async def summing(store: StoreClient, train_dataset: Any) -> float:
    """Has every task done once and answers the sum of the rewards."""
    ids = [(await store.enqueue_rollout(task, RolloutMode.TRAIN)).rollout_id for task in train_dataset]
    await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    return sum(reward.value for reward in await store.query_rewards(ids))


TASKS = [{"number": number} for number in (2, 4, 6)]


@algo
async def telling(store: StoreClient, train_dataset: Any, reporter: Reporter) -> dict[str, float]:
    """As `summing`, with a line and a metric."""
    reporter.say("three tasks" if len(train_dataset) == 3 else "other tasks")
    total = await summing(store, train_dataset)
    reporter.step(1, {"reward/mean": total / len(train_dataset)}, 1)
    return {"sum": total}


@algo
async def collapsing(reporter: Reporter, seed: int) -> int:
    """Reports groups without variance until somebody stops it; answers the seed."""
    import asyncio

    for step in range(1, 1000):
        reporter.step(step, {"reward/groups_without_variance": 1.0})
        await asyncio.sleep(0)
    return seed


@algo
async def seeded(seed: int) -> int:
    """The seed that it was given."""
    return seed


@algo
async def endless(store: StoreClient) -> None:
    """Says that it runs and waits for ever."""
    import asyncio

    print("algorithm is running", flush=True)
    await asyncio.get_running_loop().create_future()


@algo
async def waiting(reporter: Reporter) -> None:
    """As `endless`, after a step."""
    import asyncio

    reporter.step(1, {"reward/mean": 0.0})
    await asyncio.get_running_loop().create_future()


@algo
def failing(train_dataset: Any) -> None:
    """An algorithm with a defect."""
    raise RuntimeError("this algorithm is broken")


class Unready(Algorithm):
    """An algorithm that needs more than `Trainer.dev` has."""

    def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        """Not reached by `Trainer.dev`."""
        raise RuntimeError("this algorithm needs a GPU")


class NotingHook(Hook):
    """Notes the rollouts that have ended."""

    ended: ClassVar[list[str]] = []

    async def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        self.ended.append(rollout.rollout_id)
