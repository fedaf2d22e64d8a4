"""Simulated workers: lease streams that complete at once what they get, many in one process."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from agl_grpc.client import Completion, LeaseStream, StoreClient
from agl_grpc.client.lease_events import Delivered
from agl_grpc.model import EnqueueRolloutRequest, Reward, RolloutStatus
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

STREAMS = 50
"""Workers on one connection: servers commonly allow 100 streams."""


async def _work(client: StoreClient, worker_id: str, done: Counter[str]) -> None:
    async with LeaseStream(client, worker_id=worker_id, credits=1) as stream:
        async for event in stream:
            if isinstance(event, Delivered):
                lease = event.work.lease
                reward = Reward(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, value=1.0)
                await stream.complete(Completion(lease=lease, rewards=[reward]))
                done[lease.rollout_id] += 1
                stream.grant()


async def simulated_workers(
    store: StoreProcess, client: StoreClient, workers: int, rollouts: int
) -> dict[str, Any]:
    """So many workers wait, then work on so many rollouts; checks that each ends exactly once."""
    run_id = client.run_id
    done: Counter[str] = Counter()
    clients = [StoreClient(store.address, run_id=run_id) for _ in range(-(-workers // STREAMS))]
    tasks = [
        asyncio.create_task(_work(clients[number // STREAMS], f"{run_id}-{number}", done))
        for number in range(workers)
    ]

    async def all_there() -> bool:
        return len(await client.query_workers(worker_id_contains=f"{run_id}-")) == workers

    try:
        await eventually(all_there, within=120, what="all workers are there")
        began = time.monotonic()
        ids = []
        for start in range(0, rollouts, 500):
            requests = [EnqueueRolloutRequest(input=number) for number in range(min(500, rollouts - start))]
            ids += [one.rollout_id for one in await client.enqueue_many_rollouts(requests)]
        ended = await client.wait_for_rollouts(rollout_ids=ids, timeout=300)
        seconds = time.monotonic() - began
        assert Counter(one.status for one in ended) == {RolloutStatus.SUCCEEDED: rollouts}
        assert {one.attempt_count for one in ended} == {1}
        await eventually(lambda: done == Counter(ids), what="every completion is acknowledged once")
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for one in clients:
            await one.close()
    assert all(isinstance(result, asyncio.CancelledError) for result in results), "a worker broke"
    return {"workers": workers, "rollouts": rollouts, "rollouts per second": round(rollouts / seconds, 1)}
