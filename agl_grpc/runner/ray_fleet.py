"""Workers as Ray actors over a cluster: placed by what they need, replaced when lost, scaled with work."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.client import StoreError, SyncStoreClient
from agl_grpc.model import RolloutStatus
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.load import LoadError
from agl_grpc.runner.logs import configure_logging
from agl_grpc.runner.process import load_parts, loop_factory
from agl_grpc.runner.restarts import Start, WorkerStartError, end_leases, start_again
from agl_grpc.runner.signals import stopping_at_signals
from agl_grpc.runner.sweep import end_programs
from agl_grpc.runner.worker import Worker

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often actors and queue are looked at."""

SURPLUS_SECONDS = 30.0
"""How long there must be too many workers before some are drained."""

SWEEP_SECONDS = 20.0
"""How long a node may take to end the programs of a worker that was lost there."""

_UNFINISHED = (
    RolloutStatus.QUEUING,
    RolloutStatus.REQUEUING,
    RolloutStatus.PREPARING,
    RolloutStatus.RUNNING,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where and how many; `RunnerConfig.workers` is the most that there may be."""

    address: str | None = None
    """The cluster, as `ray.init` takes it; None = RAY_ADDRESS, else this machine's, else a new one."""
    cpus_per_worker: float = 1.0
    """Processors that Ray reserves for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for each worker; it sets CUDA_VISIBLE_DEVICES accordingly."""
    min_workers: int | None = None
    """Workers that stay when the queue is empty; None = all: their number does not change."""
    working_dir: str | None = None
    """Folder that Ray copies to every node; None = nodes see the working directory under the same path."""

    def __post_init__(self) -> None:
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.min_workers is not None and self.min_workers < 0:
            raise ValueError(f"min_workers is {self.min_workers}; it must be 0 or more")


class RayWorker:
    """One worker, in an actor's process. `drain` runs in another thread of it than `run`."""

    def __init__(self, config: RunnerConfig, worker_id: str) -> None:
        configure_logging(config.log_level)
        self.config = config
        self.worker_id = worker_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Worker | None = None
        self._wanted: list[bool] = []
        self._lock = threading.Lock()

    def place(self) -> tuple[str, int]:
        """The node that it runs on, and its process there."""
        import ray

        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def run(self) -> tuple[str, str]:
        """Works until it leaves; `left`, `worn out`, or `refused` with the reason."""
        try:
            agent, hooks, tracer = load_parts(self.config)
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(_work(self, agent, hooks, tracer))
        except LoadError as error:
            return "refused", str(error)
        except StoreError as error:
            return "refused", f"the store at {self.config.store} refuses {self.worker_id}: {error}"

    def begun(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        """The worker is there: orders that came before are carried out."""
        with self._lock:
            self._worker, self._loop = worker, loop
            wanted, self._wanted = self._wanted, []
        for at_once in wanted:
            self._leave(at_once)

    def drain(self, at_once: bool = False) -> None:
        """Takes nothing new and leaves after what it holds, or hands that back at once."""
        with self._lock:
            if self._loop is None:
                self._wanted.append(at_once)
                return
        self._loop.call_soon_threadsafe(self._leave, at_once)

    def _leave(self, at_once: bool) -> None:
        assert self._worker is not None
        if at_once:
            self._worker.release_now()
        else:
            self._worker.drain("the fleet asked for it")


# Not a method: one coroutine method makes all of an actor's methods run on Ray's own event loop.
async def _work(actor: RayWorker, agent: Any, hooks: list[Any], tracer: Any) -> tuple[str, str]:
    worker = Worker(actor.config, actor.worker_id, agent, hooks, tracer)
    actor.begun(worker, asyncio.get_running_loop())
    await worker.run()
    return ("worn out" if worker.worn_out else "left"), ""


@dataclass(slots=True)
class _Actor:
    index: int
    handle: Any
    start: Start
    draining: bool = False
    asked: Any = None  # what its `place` will answer; None = told already
    place: tuple[str, int] | None = None
    began: float = field(default_factory=time.monotonic)
    began_wall: float = field(default_factory=time.time)


class RayFleet:
    """Runs workers as Ray actors until they have all left or `stop` is called.

    An actor that is lost, with its process or its node, is placed anew with back-off. Its leases are ended at
    once, and so are programs that it left on a node that is still there. With `placement.min_workers` their
    number follows the run's unfinished rollouts.
    """

    def __init__(self, config: RunnerConfig, placement: Placement) -> None:
        self._config = config
        self._placement = placement
        self._actors: dict[Any, _Actor] = {}  # by what their `run` will answer
        self._due: dict[int, Start] = {}
        self._left: set[int] = set()
        self._stops = 0
        self._passed_on = 0
        self._surplus_since: float | None = None
        self._told_pending = 0

    def stop(self) -> None:
        """Asks all workers to drain; asked a second time, to hand back what they hold at once."""
        self._stops += 1

    def run(self) -> None:
        """Returns when every worker has left.

        Raises:
            WorkerStartError: Ray cannot be used, or a worker cannot run at all; the others have been stopped.
        """
        # Ray sets handlers of its own when it connects; ours come afterwards.
        with _ray(self._placement) as ray, stopping_at_signals(self.stop):
            self._warn_of_loopback(ray)
            with SyncStoreClient(self._config.store, run_id=self._config.run_id) as store:
                while not self._over():
                    self._fit(store)
                    self._start_due(ray)
                    self._collect(ray, store)
                    self._pass_on_stops(ray)

    def _over(self) -> bool:
        if self._actors:
            return False
        return bool(self._stops) or len(self._left) >= self._config.workers

    def _warn_of_loopback(self, ray: Any) -> None:
        host = self._config.store.rpartition(":")[0].strip("[]")
        with contextlib.suppress(ValueError):
            if len(ray.nodes()) > 1 and ipaddress.ip_address(host).is_loopback:
                log.warning(
                    "the store's address %s is that of each node itself: workers on others will not find it",
                    self._config.store,
                )

    # How many

    def _fit(self, store: SyncStoreClient) -> None:
        if self._stops:
            self._due.clear()
            return
        wanted = self._wanted(store)
        there = {actor.index for actor in self._actors.values() if not actor.draining} | set(self._due)
        taken = {actor.index for actor in self._actors.values()} | set(self._due) | self._left
        free = [index for index in range(self._config.workers) if index not in taken]
        for index in free[: max(0, wanted - len(there))]:
            self._due[index] = Start()
        self._drain_surplus(len(there) - wanted)

    def _wanted(self, store: SyncStoreClient) -> int:
        most = self._config.workers - len(self._left)
        if self._placement.min_workers is None:
            return most
        try:
            counts = store.statistics(run_id=self._config.run_id)["rollouts_by_status"]
        except StoreError as error:
            log.warning("the queue's length is not known, the fleet stays as it is: %s", error)
            return len(self._actors) + len(self._due)
        unfinished: int = sum(counts.get(status.value, 0) for status in _UNFINISHED)
        needed = math.ceil(unfinished / self._config.concurrency)
        return min(most, max(self._placement.min_workers, needed))

    def _drain_surplus(self, surplus: int) -> None:
        if surplus <= 0:
            self._surplus_since = None
            return
        now = time.monotonic()
        self._surplus_since = self._surplus_since or now
        if now - self._surplus_since < SURPLUS_SECONDS:
            return
        working = [actor for actor in self._actors.values() if not actor.draining]
        for actor in sorted(working, key=lambda one: -one.index)[:surplus]:
            log.info("worker %s is not needed and leaves", self._config.worker_id(actor.index))
            actor.draining = True
            actor.handle.drain.remote()

    # Life and death

    @property
    def _runtime(self) -> dict[str, str]:
        return {"working_dir": self._placement.working_dir} if self._placement.working_dir else {}

    def _start_due(self, ray: Any) -> None:
        for index, start in list(self._due.items()):
            if start.due > time.monotonic():
                continue
            del self._due[index]
            made = ray.remote(RayWorker).options(
                num_cpus=self._placement.cpus_per_worker,
                num_gpus=self._placement.gpus_per_worker,
                max_concurrency=4,
                runtime_env=self._runtime,
            )
            handle = made.remote(self._config, self._config.worker_id(index))
            self._actors[handle.run.remote()] = _Actor(index, handle, start, asked=handle.place.remote())

    def _collect(self, ray: Any, store: SyncStoreClient) -> None:
        if not self._actors:
            time.sleep(LOOK_SECONDS)
            return
        ended, _ = ray.wait(list(self._actors), num_returns=1, timeout=LOOK_SECONDS)
        for reference in ended:
            actor = self._actors.pop(reference)
            try:
                verdict, reason = ray.get(reference)
            except ray.exceptions.RayError as error:
                # One that is only out of reach must not come back beside its successor.
                ray.kill(actor.handle)
                self._sweep(ray, actor)
                self._died(actor, error, store)
            else:
                self._judge(actor, verdict, reason)
        self._tell_places(ray)

    def _tell_places(self, ray: Any) -> None:
        pending = 0
        for actor in self._actors.values():
            if actor.asked is None:
                continue
            if not ray.wait([actor.asked], timeout=0)[0]:
                pending += 1
                continue
            with contextlib.suppress(ray.exceptions.RayError):
                actor.place = ray.get(actor.asked)
                log.info("worker %s runs on node %s", self._config.worker_id(actor.index), actor.place[0])
            actor.asked = None
        if pending and pending != self._told_pending and not self._stops:
            log.info("%d workers wait for room in the cluster", pending)
        self._told_pending = pending

    def _judge(self, actor: _Actor, verdict: str, reason: str) -> None:
        name = self._config.worker_id(actor.index)
        if verdict == "refused":
            raise WorkerStartError(reason)
        if verdict == "worn out":
            log.warning("worker %s is replaced: agents that would not stop hold its memory", name)
            end_leases(self._config.store, name)
            self._due[actor.index] = Start()
            return
        log.info("worker %s left", name)
        if not actor.draining:
            self._left.add(actor.index)

    def _sweep(self, ray: Any, actor: _Actor) -> None:
        """Ends programs that a lost worker has left running on its node, if the node is still there."""
        if actor.asked is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                actor.place = ray.get(actor.asked, timeout=0)
        if actor.place is None:
            return  # lost before it was placed: it has started nothing
        node, pid = actor.place
        if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
            return
        on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(end_programs).options(
            num_cpus=0, max_retries=0, scheduling_strategy=on_node, runtime_env=self._runtime
        )
        name = self._config.worker_id(actor.index)
        try:
            ended = ray.get(task.remote(pid), timeout=SWEEP_SECONDS)
        except ray.exceptions.RayError as error:
            log.warning("programs of %s may still run on node %s: %s", name, node, _story(error))
        else:
            log.info("worker %s left %d programs on node %s, which were killed", name, ended, node)

    def _died(self, actor: _Actor, error: Exception, store: SyncStoreClient) -> None:
        name = self._config.worker_id(actor.index)
        end_leases(self._config.store, name)
        story = _story(error)
        if self._stops:
            log.warning("worker %s was lost while it was stopping: %s", name, story)
            return
        self._due[actor.index] = start_again(
            self._config,
            name,
            actor.start,
            lived=time.monotonic() - actor.began,
            took=self._took(name, actor.began_wall, store),
            death=f"was lost ({story})",
        )

    @staticmethod
    def _took(name: str, since: float, store: SyncStoreClient) -> bool:
        try:
            worker = store.get_worker_by_id(name)
        except StoreError:
            return True  # not known: never a reason to give it up
        return worker is not None and (worker.last_dequeue_time or 0.0) >= since

    def _pass_on_stops(self, ray: Any) -> None:
        if self._passed_on == self._stops:
            return
        self._passed_on = self._stops
        for reference, actor in list(self._actors.items()):
            if actor.asked is not None and not ray.wait([actor.asked], timeout=0)[0]:
                # It was never placed: there is nothing to drain.
                ray.kill(actor.handle)
                del self._actors[reference]
                continue
            actor.draining = True
            actor.handle.drain.remote(self._stops > 1)


def _story(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _ray(placement: Placement) -> Iterator[Any]:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise WorkerStartError(
            "Ray is not installed: install agl-grpc[ray], here and on the cluster's nodes"
        ) from error
    try:
        ray.init(address=placement.address, logging_level="WARNING", log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerStartError(f"no Ray cluster at {placement.address or 'RAY_ADDRESS'}: {error}") from error
    try:
        yield ray
    finally:
        # Actors that are left belong to this driver and end with it.
        ray.shutdown()
