"""A local Ray for verl: quiet, without dashboard or usage statistics, with a bounded object store."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from agl_grpc.learner.errors import LearnerError

# Bytes of the object store, through which batches travel, on CPU, where models are tiny; with accelerators it
# is Ray's own share of the machine's memory.
OBJECT_STORE_BYTES = 300 << 20
# verl's placement group asks for ten nominal CPUs a GPU; the rest is for the TransferQueue and the load
# balancer.
CPUS_PER_GPU = 10
OTHER_CPUS = 8
_TRIES = 3
# Ray has cleared away a killed trainer within a second, and one whose node is lost within half a minute.
_CLEARING_SECONDS = 60.0
_LOOK_SECONDS = 0.1
# Of every trainer that has one: the TransferQueue finds itself by this name.
_QUEUE = {"namespace": "transfer_queue", "name": "TransferQueueController"}


def common_environment() -> dict[str, str]:
    """Environment of the learner on any device: quiet, and what verl needs to be told this way."""
    return {
        # At INFO verl's separate_async trainer crashes on one of its own messages.
        "VERL_LOGGING_LEVEL": os.environ.get("VERL_LOGGING_LEVEL", "WARNING"),
        "TRANSFER_QUEUE_ENABLE": "1",
        "TQ_LOGGING_LEVEL": os.environ.get("TQ_LOGGING_LEVEL", "WARNING"),
        # Progress is a line a step, not a bar.
        "TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1"),
        # The TransferQueue asks for eight threads in each of its processes and warns where there are fewer
        # cores.
        "TQ_NUM_THREADS": str(min(8, psutil.cpu_count(logical=False) or 1)),
        "TQ_CLIENT_ZMQ_IO_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would start workers ahead that nobody takes: verl's have an environment of their own each.
        "RAY_prestart_worker_first_driver": "0",
        # Ray's own is 15, with which workers starve beside runners and engines on the same processors.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def worker_environment(device: str) -> dict[str, str]:
    """Environment of the learner and of every Ray worker on a device, ``cpu`` or ``cuda``."""
    environment = common_environment()
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _start(**arguments: Any) -> None:
    """Starts Ray; again, where a busy machine was not quick enough for its fixed 30 seconds.

    Raises:
        LearnerError: it was not quick enough three times.
    """
    import ray

    for _ in range(_TRIES):
        try:
            ray.init(**arguments)
        except Exception as error:
            # Ray has no type of its own for this.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return
    raise LearnerError(
        f"Ray did not start within its 30 s, {_TRIES} times: the machine is too busy, or its memory is full"
    )


def _await_room(gpus: int, queue: bool) -> None:
    """Waits until the cluster that was joined has room: a trainer that was killed may still be being cleared
    away when the next one comes, which would take up its TransferQueue, if it needs one, and lose it.

    Raises:
        LearnerError: the cluster has too few GPUs, or what holds them stays.
    """
    import ray

    total = int(ray.cluster_resources().get("GPU", 0))
    if total < gpus:
        raise LearnerError(
            f"the Ray cluster has {total} GPUs and the trainer needs {gpus}: add nodes, or lower "
            "trainer.nnodes or trainer.n_gpus_per_node"
        )
    deadline = time.monotonic() + _CLEARING_SECONDS
    # Ray tells nobody when a name or a GPU is free again.
    while taken := _taken(gpus, queue):
        if time.monotonic() >= deadline:
            raise LearnerError(
                f"the Ray cluster has no room for this trainer: {taken} after {_CLEARING_SECONDS:g} s; end "
                "what holds it, or name another cluster in ray_address"
            )
        time.sleep(_LOOK_SECONDS)


def _taken(gpus: int, queue: bool) -> str:
    """Why a trainer of this many GPUs cannot begin on the cluster; empty = it can."""
    import ray

    if queue and _QUEUE in ray.util.list_named_actors(all_namespaces=True):
        return "another trainer's TransferQueue is there"
    free = int(ray.available_resources().get("GPU", 0))
    return f"{free} of the {gpus} GPUs that it needs are free" if free < gpus else ""


@contextmanager
def local_ray(
    *, device: str, gpus: int, address: str = "", others: int = 0, queue: bool = False
) -> Iterator[None]:
    """Starts Ray in this process's session, or joins a cluster, and leaves it at the end.

    Args:
        device: ``cpu`` gives verl ``gpus`` nominal GPUs, because its resource pools count nothing else.
        gpus: accelerators that the trainer uses.
        address: of a Ray cluster that runs already (``HOST:6379``, ``auto``); empty = start Ray here.
        others: actors besides verl's own that each take a nominal CPU.
        queue: rows are to be in verl's TransferQueue, of which a cluster has one.

    Raises:
        LearnerError: the machine is too busy to start Ray, or the cluster has no room for a trainer.
    """
    environment = worker_environment(device)
    os.environ.update(environment)
    import ray

    started_here = {
        "num_cpus": CPUS_PER_GPU * gpus + OTHER_CPUS + others,
        "num_gpus": gpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES if device == "cpu" else None,
    }
    handler = signal.getsignal(signal.SIGTERM)
    _start(
        address=address or "local",
        **({} if address else started_here),
        logging_level="ERROR",
        log_to_driver=bool(os.environ.get("AGL_LEARNER_WORKER_LOGS")),
        runtime_env={"env_vars": environment},
    )
    if threading.current_thread() is threading.main_thread():
        # Ray's start takes SIGTERM for itself, and answers it with a stack trace and the process's end.
        signal.signal(signal.SIGTERM, handler)
    try:
        if address:
            _await_room(gpus, queue)
        yield
    finally:
        ray.shutdown()
