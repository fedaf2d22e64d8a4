"""A store that is killed in mid-run and comes back: every rollout ends exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from agl_grpc.client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest, RolloutStatus
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

ROLLOUTS = 24


async def test_results_are_kept_until_the_store_is_back(tmp_path: Path) -> None:
    with (
        StoreProcess(tmp_path / "store.db") as store,
        RunnerProcess(
            store.address, "AsyncAgent", tmp_path, "--workers", "2", "--concurrency", "4"
        ) as runner,
    ):
        async with StoreClient(store.address) as client:
            # No model calls are on their way: the seal need not wait long for them once the store is back.
            await client.update_run("default", seal_timeout_seconds=1.0)
            rollouts = await client.enqueue_many_rollouts(
                [EnqueueRolloutRequest(input={"do": "wait", "gate": "gate"}) for _ in range(ROLLOUTS)]
            )
            await eventually(lambda: len(runner.notes("started")) >= 8, within=30, what="agents started")
            store.kill()
            runner.open_gate("gate")
            await eventually(lambda: len(runner.notes("ended")) >= 8, what="agents ended without the store")
            await eventually(lambda: runner.says("their results are kept"), what="the workers say so")
            store.start()
            ids = [rollout.rollout_id for rollout in rollouts]
            done = await client.wait_for_rollouts(rollout_ids=ids, timeout=30, until="sealed")
            assert [rollout.status for rollout in done] == [RolloutStatus.SUCCEEDED] * ROLLOUTS
            # Leases outlived the restart: nothing ran twice.
            assert [rollout.attempt_count for rollout in done] == [1] * ROLLOUTS
            assert len(set(runner.notes("ended"))) == len(runner.notes("ended")) == ROLLOUTS
            rewards = await client.query_rewards(ids)
            assert Counter(reward.rollout_id for reward in rewards) == Counter(ids)
            for rollout_id in ids:
                spans = await client.query_spans(rollout_id)
                assert len({span.span_id for span in spans}) == len(spans) == 2


async def test_workers_may_be_there_before_the_store(tmp_path: Path) -> None:
    store = StoreProcess(tmp_path / "store.db")
    with RunnerProcess(store.address, "AsyncAgent", tmp_path, "--run", "later") as runner:
        await eventually(lambda: runner.says("w-0 waits for the store"), within=30, what="it waits")
        with store:
            async with StoreClient(store.address, run_id="later") as client:
                await client.create_run("later")
                rollout = await client.enqueue_rollout({"do": "nothing"})
                done = await client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=30)
                assert [ended.status for ended in done] == [RolloutStatus.SUCCEEDED]
