"""kill -9 amid lifecycle writes: what was acknowledged holds, what is repeated is done once."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from agl_grpc.v1 import reward_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from agl_grpc.v1.runner_service_pb2_grpc import RunnerServiceStub
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from tests.store.rig import SUCCEEDED
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

WORKERS = 4
LIVES = 200


class Client:
    """Runs rollouts one after another and repeats a call under its request id until it is answered."""

    def __init__(self, address: str, name: str) -> None:
        self.name = name
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 200)])
        self.store: Any = StoreServiceStub(self.channel)
        self.runner: Any = RunnerServiceStub(self.channel)
        self.done: list[str] = []
        self.repeats = 0

    async def surely(self, rpc: Any, request: Any) -> Any:
        """Calls until there is an answer."""
        while True:
            try:
                return await rpc(request, timeout=20, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                self.repeats += 1

    async def run(self, count: int) -> None:
        """So many lives, each with a reward."""
        for i in range(count):
            tag = f"{self.name}-{i}"
            queue = f"q-{self.name}"
            enqueue = store_service_pb2.EnqueueRolloutsRequest(
                request_id=f"e-{tag}", rollouts=[rollout_pb2.RolloutSpec(rollout_id=tag, queue=queue)]
            )
            await self.surely(self.store.EnqueueRollouts, enqueue)
            lease = runner_service_pb2.LeaseRolloutsRequest(
                request_id=f"l-{tag}", worker_id=self.name, session_id="s", work={"queues": [queue]}
            )
            (leased,) = (await self.surely(self.runner.LeaseRollouts, lease)).rollouts
            assert leased.rollout.rollout_id == tag
            complete = runner_service_pb2.CompleteAttemptsRequest(request_id=f"c-{tag}", worker_id=self.name)
            complete.completions.add(
                attempt_id=leased.attempt.attempt_id,
                lease_token=leased.lease.lease_token,
                status=SUCCEEDED,
                rewards=[reward_pb2.Reward(value=float(i))],
            )
            (result,) = (await self.surely(self.runner.CompleteAttempts, complete)).results
            assert not result.HasField("error"), result
            self.done.append(tag)


def more_than(clients: list[Client], count: int) -> bool:
    """Whether so many lives are over."""
    return sum(len(client.done) for client in clients) >= count


async def test_every_acknowledged_life_survives_kill_9_exactly_once(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    server = StoreProcess(tmp_path / "store.db")
    server.start()
    try:
        clients = [Client(server.address, f"w{i}") for i in range(WORKERS)]
        lives = asyncio.gather(*(client.run(LIVES) for client in clients))
        for _ in range(2):
            enough = sum(len(client.done) for client in clients) + choose.randint(10, 50)
            await eventually(partial(more_than, clients, enough), within=60, what="more lives")
            server.kill()
            await asyncio.get_running_loop().run_in_executor(None, server.start)
        await lives
        assert sum(client.repeats for client in clients) > 0
        for client in clients:
            answer = await client.store.ListRollouts(
                store_service_pb2.ListRolloutsRequest(
                    filter={"queue_in": [f"q-{client.name}"]}, page_size=1000, include_attempts=True
                )
            )
            found = {one.rollout.rollout_id: one for one in answer.rollouts}
            assert sorted(found) == sorted(client.done)
            assert all(one.attempt.status == SUCCEEDED for one in found.values())
            assert all(one.rollout.attempt_count == 1 for one in found.values())
            rewards = await client.store.ListRewards(
                store_service_pb2.ListRewardsRequest(
                    rollout_ids=client.done, all_revisions=True, page_size=1000
                )
            )
            assert sorted(one.value for one in rewards.rewards) == [float(i) for i in range(LIVES)]
            await client.channel.close()
    finally:
        server.kill()
