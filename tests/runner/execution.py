"""Has a real worker do a task, and reads what came of it."""

from __future__ import annotations

from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.model import Rollout
from tests.runner.runner_process import RunnerProcess


async def execute(client: StoreClient, runner: RunnerProcess, task: Any, **options: Any) -> Rollout:
    """Has the worker that serves the queue of the runner's name do a task; the sealed rollout."""
    rollout = await client.enqueue_rollout(task, queue=runner.name, **options)
    ended = await client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=30, until="sealed")
    assert ended, runner.log.read_text()
    return ended[0]


async def rewards_of(client: StoreClient, rollout: Rollout) -> dict[str, float]:
    """The rollout's rewards by name."""
    return {reward.name: reward.value for reward in await client.query_rewards([rollout.rollout_id])}
