"""Validation: every task by the run's own workers, scored by what the store keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agl_grpc import StoreClient
from agl_grpc.model import RolloutMode
from agl_grpc.runner import LitAgentRunner
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.validate import validate
from tests.support.store_process import StoreProcess
from tests.trainer import agents


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[StoreClient]:
    with StoreProcess(tmp_path / "agl.db") as store:
        async with StoreClient(store.address) as made:
            yield made


@pytest.fixture
async def worker(client: StoreClient) -> AsyncIterator[None]:
    """A worker of `halver` for the run's own queue."""
    stop = asyncio.Event()
    async with LitAgentRunner(concurrency=8).run_context(agent=agents.halver, store=client) as runner:
        work = asyncio.create_task(runner.iter(stop))
        yield
        stop.set()
        await work


@pytest.mark.usefixtures("worker")
async def test_means_are_over_all_rollouts_and_failures_are_told_apart(client: StoreClient) -> None:
    seen: list[tuple[int, int]] = []
    tasks = [{"number": 2}, {"number": 4}, {"number": -1}]
    score = await validate(
        client, tasks, samples=2, on_progress=lambda done, of: seen.append((done, of)), timeout=60
    )
    assert score.task_means == (1.0, 2.0, 0.0)
    assert score.mean == pytest.approx(1.0)
    assert (score.tasks, score.rollouts) == (3, 6)
    assert score.failures == {"agent": 2}
    assert seen[-1] == (6, 6)
    rollouts = await client.query_rollouts()
    assert {rollout.mode for rollout in rollouts} == {RolloutMode.VAL}
    assert len({rollout.group_id for rollout in rollouts}) == 3


@pytest.mark.usefixtures("worker")
async def test_two_passes_do_not_disturb_each_other(client: StoreClient) -> None:
    first, second = await asyncio.gather(
        validate(client, [{"number": 2}], samples=3, timeout=60),
        validate(client, [{"number": 8}], timeout=60),
    )
    assert (first.mean, first.rollouts) == (1.0, 3)
    assert (second.mean, second.rollouts) == (4.0, 1)


async def test_without_workers_it_says_how_far_it_came(client: StoreClient) -> None:
    with pytest.raises(TrainerError, match=r"0 of 1 rollouts were finished after 0\.2 s"):
        await validate(client, [{"number": 2}], timeout=0.2)


async def test_an_empty_dataset_has_no_score(client: StoreClient) -> None:
    score = await validate(client, [], samples=4)
    assert (score.mean, score.rollouts, score.failures) == (0.0, 0, {})
