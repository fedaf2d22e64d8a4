"""What a worker costs: real store on disk, real worker processes, an agent that does nothing.

The life of a rollout in a worker is lease → trace with its root span on disk → completion on disk. Time from
lease to completion is the store's own, between the two commits; processor time is that of the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import psutil

from agl_grpc.client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest, RolloutStatus
from benchmarks import processor
from benchmarks.clients import on_loop
from benchmarks.figures import Row, figure, percentile, run
from benchmarks.servers import ROOT, folder, store_server

SAMPLE = 500
"""Attempts whose times are read for a percentile."""
WARM_UP = 100
"""Rollouts of each worker process before the clock runs."""


@dataclass(frozen=True)
class Measured:
    """One measurement: times in milliseconds, processor time of the workers alone."""

    per_second: float
    p50: float
    p99: float
    cpu_per_rollout: float


@contextlib.contextmanager
def runner(address: str, run_id: str, *options: str) -> Iterator[psutil.Process]:
    """`agl-grpc runner start` on an empty agent."""
    command = [sys.executable, "-m", "agl_grpc_cli", "runner", "start", "--store", address, "--run", run_id]
    command += ["--name", run_id, "--log-level", "warning", *options]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def waiting(client: StoreClient, name: str, workers: int) -> None:
    """Returns when so many workers wait for work."""
    while True:
        found = await client.query_workers(worker_id_contains=name)
        if sum(worker.idle_reason == "no work" for worker in found) >= workers:
            return
        await asyncio.sleep(0.05)


def processor_seconds(supervisor: psutil.Process) -> float:
    """Processor time of the workers and all that they have started."""
    return processor.seconds(*(child.pid for child in supervisor.children(recursive=True)))


async def execute(client: StoreClient, count: int) -> list[str]:
    """Has so many rollouts executed; their ids."""
    ids = []
    for first in range(0, count, 500):
        size = min(500, count - first)
        made = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input={"n": 1})] * size)
        ids += [rollout.rollout_id for rollout in made]
    done = 0
    for first in range(0, count, 500):
        ended = await client.wait_for_rollouts(rollout_ids=ids[first : first + 500], timeout=300)
        done += sum(rollout.status is RolloutStatus.SUCCEEDED for rollout in ended)
    assert done == count, f"{done} of {count} rollouts succeeded"
    return ids


async def attempt_milliseconds(client: StoreClient, rollout_ids: Sequence[str]) -> AsyncIterator[float]:
    """From each rollout's lease to its completion."""
    for rollout_id in rollout_ids:
        attempt = await client.get_latest_attempt(rollout_id)
        assert attempt is not None
        assert attempt.end_time is not None
        yield 1000 * (attempt.end_time - attempt.start_time)


async def measure(address: str, run_id: str, rollouts: int, workers: int, *options: str) -> Measured:
    """Executes rollouts with workers that wait already."""
    with runner(address, run_id, "--workers", str(workers), *options) as supervisor:
        async with StoreClient(address, run_id=run_id) as client:
            await client.create_run(run_id)
            await waiting(client, run_id, workers)
            await execute(client, WARM_UP * workers)
            cpu, began = processor_seconds(supervisor), time.perf_counter()
            ids = await execute(client, rollouts)
            elapsed = time.perf_counter() - began
            cpu = processor_seconds(supervisor) - cpu
            times = [one async for one in attempt_milliseconds(client, ids[:: max(1, rollouts // SAMPLE)])]
    return Measured(rollouts / elapsed, percentile(times, 50), percentile(times, 99), 1000 * cpu / rollouts)


def measure_all(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    empty = ("--agent", "benchmarks.empty_agent:EmptyAgent")
    threaded = ("--agent", "benchmarks.empty_agent:EmptySyncAgent")
    with folder() as place, store_server(place / "store.db") as store:

        def timed(name: str, rollouts: int, workers: int, *runner_options: str) -> Measured:
            count = max(50, int(rollouts * options.scale))
            found: Measured = on_loop(measure(store.address, name, count, workers, *runner_options))
            return found

        single = timed("single", 1000, 1, *empty)
        full = timed("full", 6000, 2, "--concurrency", "64", *empty)
        thread = timed("thread", 3000, 2, "--concurrency", "64", *threaded)
        process = timed("process", 1000, 1, "--concurrency", "4", "--isolation", "process", *empty)
        program = timed("program", 200, 1, "--concurrency", "4", "--command", "true")
    return [
        figure("lease to completion, concurrency 1, p50", "ms", single.p50, "<= 3"),
        figure("lease to completion, concurrency 1, p99", "ms", single.p99),
        figure("worker's processor time per rollout, concurrency 1", "ms", single.cpu_per_rollout),
        figure("rollouts, 2 processes of 64", "rollouts/s", full.per_second, ">= 500"),
        figure("workers' processor time per rollout, 2 processes of 64", "ms", full.cpu_per_rollout),
        figure("rollouts of a sync agent, 2 processes of 64", "rollouts/s", thread.per_second),
        figure("rollouts, isolation process, 4 at once", "rollouts/s", process.per_second),
        figure("rollouts, isolation command (`true`), 4 at once", "rollouts/s", program.per_second),
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure_all, scale=(1.0, "share of the rollouts; 1 = all")))
