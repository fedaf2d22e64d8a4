"""A Ray cluster whose workers begin with everything imported, for scripts that start many trainers.

`python -m tests.learner.warm_ray NODES` says its address, and keeps it until its input ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from agl_grpc.learner.verl.ray_runtime import CPUS_PER_GPU, OTHER_CPUS, worker_environment
from tests.learner import warm_worker
from tests.learner.forked import CONTEXT
from tests.support.environments import learner_environment, learner_python

STORE_BYTES = 100 << 20


@contextmanager
def warm_cluster(nodes: int) -> Iterator[str]:
    """A cluster of nodes with a nominal GPU each; its address."""
    os.environ.update(worker_environment("cpu"))
    with tempfile.TemporaryDirectory(prefix="agl-warm-") as folder, ExitStack() as stack:
        path = os.environ[warm_worker.SOCKET] = str(Path(folder) / "socket")
        stack.enter_context(_imported(path))
        yield stack.enter_context(_running(nodes))


@contextmanager
def cluster_process(nodes: int) -> Iterator[str]:
    """The same for those who are not in the learner environment: a process there keeps the cluster."""
    command = [learner_python(), "-m", "tests.learner.warm_ray", str(nodes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=learner_environment(), text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start; see the lines above"
        # Its input ends with this, and so does it.
        yield address


@contextmanager
def _running(nodes: int) -> Iterator[str]:
    """The cluster in a process of its own: Ray's threads would keep this one from being forked."""
    mine, its = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_run, args=(nodes, its, mine))
    process.start()
    its.close()
    try:
        yield mine.recv()
    finally:
        mine.close()
        process.join()


def _run(nodes: int, connection: Connection, other_end: Connection) -> None:
    """Runs the cluster, and says its address, until the other end is closed or its process has ended."""
    other_end.close()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for number in range(nodes):
            cluster.add_node(
                num_cpus=CPUS_PER_GPU + OTHER_CPUS,
                num_gpus=1,
                object_store_memory=STORE_BYTES,
                setup_worker_path=warm_worker.__file__,
                **({"include_dashboard": False} if number == 0 else {}),
            )
        connection.send(cluster.address)
        connection.poll(None)
    finally:
        cluster.shutdown()


@contextmanager
def _imported(path: str) -> Iterator[None]:
    """The process that forks the workers."""
    command = [sys.executable, "-m", "tests.learner.warm_workers", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the workers' imports failed; see the lines above"
        try:
            yield
        finally:
            process.stdin.close()


if __name__ == "__main__":
    with warm_cluster(int(sys.argv[1])) as cluster:
        print(cluster, flush=True)
        sys.stdin.read()
