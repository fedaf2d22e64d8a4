"""Workers as Ray actors on a real local cluster of two nodes, one of which is lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model import RolloutConfig, RolloutStatus
from tests.runner.agents import FOLDER
from tests.runner.runner_process import ROOT, RunnerProcess
from tests.support.environments import learner_python
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
LONG = 150.0


class RayCluster:
    """Two nodes of two processors each, and a head without any."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {
            FOLDER: str(folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with (folder / "cluster.log").open("wb") as log:
            self.process = subprocess.Popen(
                [learner_python(), "-m", "tests.runner.ray_cluster", "2", "2"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        self.address = self._read()
        if ":" not in self.address:
            # Ray gives each node 30 s to start, which a very busy machine exceeds.
            self.close()
            raise AssertionError((folder / "cluster.log").read_text())

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, order: str) -> None:
        """Has the cluster changed."""
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        assert self._read() == "done"

    def close(self) -> None:
        """Ends it with all its processes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def cluster(folder: Path) -> Iterator[RayCluster]:
    """A cluster of the test's own."""
    opened = RayCluster(folder)
    yield opened
    opened.close()


async def test_workers_over_a_cluster_that_loses_a_node(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, cluster: RayCluster
) -> None:
    options = ["--run", run_id, "--ray", "--address", cluster.address, "--workers", "4"]
    options += ["--min-workers", "1", "--lease", "5"]
    with RunnerProcess(store.address, "AsyncAgent", folder, *options, python=learner_python()) as runner:
        await eventually(
            lambda: runner.says("w-0 runs on node"), within=LONG, what="the first worker is there"
        )
        # The queue grows: all four are needed, two on each node.
        task = {"do": "wait", "gate": "gate"}
        config = RolloutConfig(max_redeliveries=10)
        rollouts = [await client.enqueue_rollout(task, config=config) for _ in range(4)]
        await eventually(lambda: len(runner.notes("started")) >= 4, within=LONG, what="four agents started")
        await eventually(lambda: len(_places(runner)) == 4, within=LONG, what="all places are told")
        assert len(set(_places(runner).values())) == 2
        await asyncio.to_thread(cluster.tell, "kill 1")
        await eventually(lambda: runner.says("was lost ("), within=LONG, what="the loss is noticed")
        await asyncio.to_thread(cluster.tell, "add")
        await eventually(lambda: len(runner.notes("started")) >= 6, within=LONG, what="lost work is redone")
        runner.open_gate("gate")
        ids = [rollout.rollout_id for rollout in rollouts]
        done = await client.wait_for_rollouts(rollout_ids=ids, timeout=LONG)
        assert [rollout.status for rollout in done] == [RolloutStatus.SUCCEEDED] * 4
        attempts = [attempt for one in ids for attempt in await client.query_attempts(one)]
        assert sum(attempt.lease_lost for attempt in attempts) == len(attempts) - 4 == 2
        runner.terminate()
        assert await asyncio.to_thread(runner.wait, LONG) == 0, runner.log.read_text()
        workers = await client.query_workers(worker_id_contains="w-")
        assert {worker.idle_reason for worker in workers if worker.last_dequeue_time} <= {"it has left"}


async def test_programs_of_a_killed_actor_are_ended_on_its_node(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, cluster: RayCluster
) -> None:
    # The program notes itself and its worker's process, and would stay for ever.
    note = f"echo $$ $AGL_GRPC_WORKER_PID >> {folder}/programs; exec sleep 1000000"
    options = ["--run", run_id, "--ray", "--address", cluster.address, "--workers", "1", "--command", note]
    options += ["--drain", "1"]
    with RunnerProcess(store.address, None, folder, *options, python=learner_python()) as runner:
        await client.enqueue_rollout(1, config=RolloutConfig(max_redeliveries=10))
        await eventually(lambda: runner.notes("programs"), within=LONG, what="the program runs")
        program, worker = map(int, runner.notes("programs")[0].split())
        left = psutil.Process(program)
        await eventually(lambda: runner.says("w-0 runs on node"), within=LONG, what="its place is told")
        psutil.Process(worker).kill()
        await eventually(lambda: len(runner.notes("programs")) >= 2, within=LONG, what="it is done again")
        assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
        assert runner.says("worker w-0 left 1 programs on node")
        runner.terminate()
        assert await asyncio.to_thread(runner.wait, LONG) == 0, runner.log.read_text()


def _places(runner: RunnerProcess) -> dict[str, str]:
    lines = [line for line in runner.log.read_text().splitlines() if " runs on node " in line]
    return {line.split("worker ")[1].split()[0]: line.split()[-1] for line in lines}
