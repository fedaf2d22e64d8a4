"""Calls whose answers are lost are made again and change nothing twice."""

from __future__ import annotations

import asyncio
import os
import random

from agl_grpc.client import Completion, LeasedRollout, RetryPolicy, StoreClient
from agl_grpc.model import RolloutStatus
from agl_grpc.store.door.app import StoreServer
from tests.client.flaky import FlakyProxy

QUICK = RetryPolicy(timeout=30.0, first_wait=0.005, longest_wait=0.02)


async def test_nothing_happens_twice_when_connections_break(store: StoreServer, client: StoreClient) -> None:
    seed = int(os.environ.get("AGL_GRPC_TEST_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with FlakyProxy(store.address) as proxy, StoreClient(proxy.address, retry=QUICK) as through:
        working = True

        async def break_often() -> int:
            broken = 0
            while working:
                await asyncio.sleep(chance.uniform(0.002, 0.02))
                proxy.cut()
                broken += 1
            return broken

        breaking = asyncio.create_task(break_often())

        async def live(number: int) -> str:
            made = await through.enqueue_rollout(number)
            (work,) = await _leased(through, f"w-{number}")
            (result,) = await through.complete_attempts("w", [Completion(lease=work.lease)])
            assert getattr(result, "status", result) is RolloutStatus.SUCCEEDED
            return made.rollout_id

        ids = [await live(number) for number in range(60)]
        working = False
        assert await breaking > 10
    everything = await client.query_rollouts()
    assert [rollout.input for rollout in everything] == list(range(60))
    assert [rollout.rollout_id for rollout in everything] == ids
    assert {rollout.attempt_count for rollout in everything} == {1}


async def _leased(client: StoreClient, worker_id: str) -> list[LeasedRollout]:
    return await client.lease_rollouts(worker_id, "session", limit=1, wait=10.0)
