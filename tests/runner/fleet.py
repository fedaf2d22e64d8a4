"""Fleets of real workers under fire, and what a trainer has to see of them: every rollout ends exactly once.

A machine is a supervisor with its workers. Sizes are the caller's: the suite runs small fleets,
`make reliability` full ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from agl_grpc.client import StoreClient
from agl_grpc.model import Attempt, AttemptStatus, EnqueueRolloutRequest, RolloutConfig, RolloutStatus
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

LONG = 600.0
OVER = (RolloutStatus.SUCCEEDED, RolloutStatus.FAILED, RolloutStatus.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How large the fleet is, and how long its work takes."""

    machines: int
    workers: int
    """Of each machine."""
    rollouts: int
    concurrency: int = 4
    lease_seconds: float = 2.0
    slack_seconds: float = 1.0
    """How long after a lost lease its rollout may wait to be delivered again."""
    nap_seconds: float = 0.2
    """How long an agent takes at most."""


@dataclass
class Seen:
    """What the trainer saw of each rollout, in order."""

    statuses: dict[str, list[RolloutStatus]] = field(default_factory=lambda: defaultdict(list))

    def over(self) -> int:
        """How many have ended."""
        return sum(statuses[-1] in OVER for statuses in self.statuses.values())

    def check(self, rollout_ids: list[str]) -> None:
        """Every rollout succeeded, and never did anything afterwards."""
        for rollout_id in rollout_ids:
            statuses = self.statuses[rollout_id]
            first = next(index for index, status in enumerate(statuses) if status in OVER)
            assert set(statuses[first:]) == {RolloutStatus.SUCCEEDED}, (rollout_id, statuses)


@contextlib.contextmanager
def machines(store: StoreProcess, fleet: Fleet, run_id: str, folder: Path) -> Iterator[list[RunnerProcess]]:
    """The fleet, started."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(machine(store, fleet, run_id, folder, str(number)))
            for number in range(fleet.machines)
        ]


def machine(store: StoreProcess, fleet: Fleet, run_id: str, folder: Path, name: str) -> RunnerProcess:
    """One machine of the fleet, to be started."""
    options = ["--run", run_id, "--workers", str(fleet.workers), "--concurrency", str(fleet.concurrency)]
    options += ["--lease", str(fleet.lease_seconds)]
    return RunnerProcess(store.address, "AsyncAgent", folder, *options, name=f"{run_id}-m{name}")


@contextlib.asynccontextmanager
async def trainer(client: StoreClient) -> AsyncIterator[Seen]:
    """Watches the run's rollouts as a trainer does."""
    seen = Seen()

    async def watch() -> None:
        async for change in client.watch_rollouts(include_existing=True):
            for rollout in change.items:
                seen.statuses[rollout.rollout_id].append(rollout.status)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def enqueue(client: StoreClient, fleet: Fleet, dice: random.Random) -> list[str]:
    """The fleet's work."""
    requests = [
        EnqueueRolloutRequest(
            input={"do": "nap", "seconds": dice.uniform(0, fleet.nap_seconds)},
            # Lost leases are the test's doing: none may use a rollout up.
            config=RolloutConfig(max_redeliveries=100),
        )
        for _ in range(fleet.rollouts)
    ]
    return [rollout.rollout_id for rollout in await client.enqueue_many_rollouts(requests)]


async def all_work(client: StoreClient, fleet: Fleet, run_id: str) -> None:
    """Returns when every worker of the fleet has said that it is there."""

    async def there() -> bool:
        found = await client.query_workers(worker_id_contains=f"{run_id}-m")
        return len(found) >= fleet.machines * fleet.workers

    await eventually(there, within=LONG, what="all workers are there")


async def end_of(client: StoreClient, seen: Seen, rollout_ids: list[str]) -> dict[str, list[Attempt]]:
    """Waits for the end; checks what the trainer saw, results and rewards. The attempts of each rollout."""
    ended = await client.wait_for_rollouts(rollout_ids=rollout_ids, timeout=LONG, until="sealed")
    assert len(ended) == len(rollout_ids), f"{len(ended)} of {len(rollout_ids)} ended"
    await eventually(lambda: seen.over() >= len(rollout_ids), within=LONG, what="the trainer saw all ends")
    seen.check(rollout_ids)
    attempts = {rollout_id: list(await client.query_attempts(rollout_id)) for rollout_id in rollout_ids}
    rewards: dict[str, list[str]] = defaultdict(list)
    for start in range(0, len(rollout_ids), 500):
        for reward in await client.query_rewards(rollout_ids[start : start + 500]):
            rewards[reward.rollout_id].append(reward.attempt_id)
    for rollout_id, tries in attempts.items():
        winners = [one.attempt_id for one in tries if one.status is AttemptStatus.SUCCEEDED]
        assert len(winners) == 1, (rollout_id, tries)
        assert winners == [tries[-1].attempt_id]
        assert rewards[rollout_id] == winners
    return attempts


async def killed_workers(
    store: StoreProcess, client: StoreClient, fleet: Fleet, folder: Path, seed: int
) -> dict[str, Any]:
    """Kills a tenth of the workers, and then a whole machine, in mid-run. What it cost."""
    dice = random.Random(seed)
    run_id = client.run_id
    with machines(store, fleet, run_id, folder) as fleet_now:
        await all_work(client, fleet, run_id)
        async with trainer(client) as seen:
            ids = await enqueue(client, fleet, dice)
            await eventually(lambda: seen.over() > fleet.rollouts // 5, within=LONG, what="a fifth is done")
            victims = _workers(fleet_now)
            share = max(1, len(victims) // 10)
            kills = [_kill(victim) for victim in dice.sample(victims, share)]
            await eventually(lambda: seen.over() > fleet.rollouts // 2, within=LONG, what="half is done")
            # Nobody is left to end its leases: they have to run out.
            kills += _kill_machine(
                dice.choice([one for one in fleet_now if len(one.workers()) == fleet.workers])
            )
            attempts = await end_of(client, seen, ids)
    slowest = check_redelivery(attempts, kills, fleet.lease_seconds + fleet.slack_seconds)
    lost = sum(one.lease_lost for tries in attempts.values() for one in tries)
    return {
        "seed": seed,
        "rollouts": len(ids),
        "workers": fleet.machines * fleet.workers,
        "workers killed": len(kills),
        "leases lost": lost,
        "lease seconds": fleet.lease_seconds,
        "slowest redelivery after a death, seconds": round(slowest, 3),
    }


def _workers(fleet_now: list[RunnerProcess]) -> list[psutil.Process]:
    return [worker for one in fleet_now for worker in one.workers()]


def _kill(process: psutil.Process) -> float:
    process.kill()
    return time.time()


def _kill_machine(one: RunnerProcess) -> list[float]:
    assert one.process is not None
    workers = one.workers()
    one.process.kill()
    kills = [_kill(worker) for worker in workers]
    one.process.wait()
    return kills


def check_redelivery(attempts: dict[str, list[Attempt]], kills: list[float], limit: float) -> float:
    """Lost work was delivered again within so many seconds of the death; the longest it took."""
    slowest = 0.0
    for tries in attempts.values():
        for lost, again in itertools.pairwise(tries):
            if not lost.lease_lost:
                continue
            assert lost.end_time is not None
            death = max((kill for kill in kills if kill <= again.start_time), default=lost.end_time)
            slowest = max(slowest, again.start_time - death)
    assert slowest <= limit, f"redelivered only {slowest:.2f} s after its worker's death"
    return slowest


async def store_away(
    store: StoreProcess, client: StoreClient, fleet: Fleet, folder: Path, seconds: float
) -> dict[str, Any]:
    """Kills the store while all agents are at work, and lets it come back long after they have finished."""
    run_id = client.run_id
    request = EnqueueRolloutRequest(input={"do": "wait", "gate": "gate"})
    with machines(store, fleet, run_id, folder) as fleet_now:
        await all_work(client, fleet, run_id)
        async with trainer(client) as seen:
            rollouts = await client.enqueue_many_rollouts([request] * fleet.rollouts)
            held = fleet.machines * fleet.workers * fleet.concurrency
            some = fleet_now[0]
            await eventually(lambda: len(some.notes("started")) == held, within=LONG, what="all are at work")
            store.kill()
            some.open_gate("gate")
            await eventually(lambda: len(some.notes("ended")) == held, within=LONG, what="all have finished")
            finished = set(some.notes("ended"))
            await asyncio.sleep(seconds)  # no wait for anything: that it is away is what happens here
            assert all(one.says("their results are kept") for one in fleet_now)
            await asyncio.to_thread(store.start)
            attempts = await end_of(client, seen, [rollout.rollout_id for rollout in rollouts])
    tries = [one for several in attempts.values() for one in several]
    assert finished <= {one.attempt_id for one in tries if one.status is AttemptStatus.SUCCEEDED}
    assert len(tries) == len(rollouts), "something ran twice"
    assert len(some.notes("ended")) == len(rollouts), "an agent ran whose attempt nobody knows"
    return {
        "rollouts": len(rollouts),
        "workers": fleet.machines * fleet.workers,
        "seconds away": seconds,
        "results held meanwhile": len(finished),
        "delivered again": 0,
    }


async def rolling_restart(
    store: StoreProcess, client: StoreClient, fleet: Fleet, folder: Path, seed: int
) -> dict[str, Any]:
    """Drains and replaces one machine after the other, and restarts the store in between. What it cost."""
    dice = random.Random(seed)
    run_id = client.run_id
    began = time.monotonic()
    with machines(store, fleet, run_id, folder) as fleet_now, contextlib.ExitStack() as stack:
        await all_work(client, fleet, run_id)
        async with trainer(client) as seen:
            ids = await enqueue(client, fleet, dice)
            for number, old in enumerate(fleet_now):
                part = fleet.rollouts * (number + 1) // (len(fleet_now) + 2)
                await eventually(lambda: seen.over() > part, within=LONG, what="a part is done")  # noqa: B023  # awaited at once
                old.terminate()
                stack.enter_context(machine(store, fleet, run_id, folder, f"{number}-again"))
                assert await asyncio.to_thread(old.wait, LONG) == 0, old.log.read_text()
                if number == len(fleet_now) // 2:
                    assert await asyncio.to_thread(store.stop, LONG) == 0
                    await asyncio.to_thread(store.start)
            attempts = await end_of(client, seen, ids)
    tries = [one for several in attempts.values() for one in several]
    assert not any(one.lease_lost for one in tries), "a restart lost a lease"
    return {
        "seed": seed,
        "rollouts": len(ids),
        "workers": fleet.machines * fleet.workers,
        "failed rollouts": 0,
        "attempts handed back": len(tries) - len(ids),
        "seconds": round(time.monotonic() - began, 1),
    }
