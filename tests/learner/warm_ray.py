"""A Ray cluster whose workers begin with everything imported, for scripts that start many trainers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agl_grpc.learner.verl.ray_runtime import CPUS_PER_GPU, OTHER_CPUS, worker_environment
from tests.learner import warm_worker

STORE_BYTES = 100 << 20


@contextmanager
def warm_cluster(nodes: int) -> Iterator[str]:
    """A cluster of nodes with a nominal GPU each; its address."""
    os.environ.update(worker_environment("cpu"))
    with tempfile.TemporaryDirectory(prefix="agl-warm-") as folder, ExitStack() as stack:
        path = os.environ[warm_worker.SOCKET] = str(Path(folder) / "socket")
        stack.enter_context(_imported(path))
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        stack.callback(cluster.shutdown)
        for number in range(nodes):
            cluster.add_node(
                num_cpus=CPUS_PER_GPU + OTHER_CPUS,
                num_gpus=1,
                object_store_memory=STORE_BYTES,
                setup_worker_path=warm_worker.__file__,
                **({"include_dashboard": False} if number == 0 else {}),
            )
        yield cluster.address


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
