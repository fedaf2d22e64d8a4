"""A runner in this process: single rollouts for trying an agent out, or a worker loop among others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from agl_grpc.agent import LitAgent
from agl_grpc.client import SpanGroup, SpanStreamer, StoreClient
from agl_grpc.model import AttemptedRollout, AttemptStatus, NamedResources, Rollout, RolloutMode
from agl_grpc.runner.attend import rewards_of
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.executor import Executor, Task
from agl_grpc.runner.hooks import Hook
from agl_grpc.runner.outcome import Outcome
from agl_grpc.runner.resources import bind_to_attempt
from agl_grpc.runner.worker import Worker
from agl_grpc.tracer import OtelTracer, Tracer

_LOOK_SECONDS = 0.1


class StopEvent(Protocol):
    """An event that ends `LitAgentRunner.iter`: of asyncio, threading or multiprocessing."""

    def is_set(self) -> bool:
        """Whether it is time to stop."""


class LitAgentRunner:
    """Runs one agent in the caller's process and event loop.

    Call `init` and `init_worker` first, or use `run_context`, which does both and cleans up:

        async with LitAgentRunner().run_context(agent=agent, store=client) as runner:
            rollout = await runner.step({"question": "2 + 2"})

    `tracer` records the agent's spans; `max_rollouts` ends `iter`; `concurrency` is how many rollouts `iter`
    executes at once, `queues` which it serves (empty = the run's own), `drain_seconds` how long agents may
    finish when it stops; `heartbeat_interval` is in seconds. Nothing polls: work is pushed; `poll_interval`
    and what follows it are accepted for older callers and not used.
    """

    def __init__(
        self,
        tracer: Tracer | None = None,
        max_rollouts: int | None = None,
        *,
        concurrency: int = 1,
        heartbeat_interval: float = 10.0,
        drain_seconds: float = 30.0,
        queues: Sequence[str] = (),
        poll_interval: object = None,
        interval_jitter: object = None,
        heartbeat_launch_mode: object = None,
        heartbeat_include_gpu: object = None,
    ) -> None:
        self.tracer: Tracer = tracer or OtelTracer()
        self._drain_seconds = drain_seconds
        self._queues = queues
        self._max_rollouts = max_rollouts
        self._concurrency = concurrency
        self._heartbeat_interval = heartbeat_interval
        self._agent: LitAgent[Any] | None = None
        self._hooks: Sequence[Hook] = ()
        self._store: StoreClient | None = None
        self._streamer: SpanStreamer | None = None
        self._worker_id = ""

    @property
    def worker_id(self) -> str:
        """The id under which the store knows this runner."""
        return self._worker_id

    def init(self, agent: LitAgent[Any], hooks: Sequence[Hook] = ()) -> None:
        """Names the agent to run and the hooks around it."""
        self._agent = agent
        self._hooks = hooks
        agent.set_runner(self)

    def init_worker(self, worker_id: int | str, store: StoreClient) -> None:
        """Names the store; `worker_id` is a number, or the full id. On the store client's event loop."""
        host = f"{socket.gethostname()}-{os.getpid()}"
        self._worker_id = worker_id if isinstance(worker_id, str) else f"{host}-{worker_id}"
        self._store = store
        self._streamer = SpanStreamer(store).start()
        self.tracer.init_worker(self._worker_id, self._streamer)

    async def teardown_worker(self, worker_id: int | str = 0) -> None:
        """Brings what was recorded to disk and lets go of the store. The client stays open."""
        await self.tracer.teardown_worker(worker_id)
        streamer, self._streamer = self._streamer, None
        if streamer is not None:
            await streamer.close()
        self._store = None

    def teardown(self) -> None:
        """Lets go of agent and hooks."""
        self._agent = None
        self._hooks = ()

    @contextlib.asynccontextmanager
    async def run_context(
        self,
        *,
        agent: LitAgent[Any],
        store: StoreClient,
        hooks: Sequence[Hook] = (),
        worker_id: int | str = 0,
    ) -> AsyncIterator[LitAgentRunner]:
        """The runner, ready for `step` and `iter`; cleaned up at the end of the block."""
        self.init(agent, hooks)
        self.init_worker(worker_id, store)
        try:
            yield self
        finally:
            await self.teardown_worker(worker_id)
            self.teardown()

    async def step(
        self,
        input: Any,
        *,
        resources: NamedResources | None = None,
        mode: RolloutMode | str | None = None,
    ) -> Rollout:
        """Makes one rollout and executes it at once, without a queue; answers it as it ended.

        `resources` are published for it; without them it gets the run's latest. What the agent raises ends up
        in the rollout's `failure`.

        Raises:
            RuntimeError: the runner has no agent or no store yet.
            StoreError: the store refused something.
        """
        agent, store, streamer = self._ready()
        resources_id = None if resources is None else (await store.add_resources(resources)).resources_id
        rollout = await store.start_rollout(
            input, mode, resources_id, worker_id=self._worker_id, run_id=store.run_id
        )
        if resources is None:
            resources = await self._published(store, rollout)
        executor = Executor(agent, self.tracer, self._hooks, self)
        try:
            outcome = await executor.execute(Task(rollout, bind_to_attempt(resources, rollout)))
            await self._deliver(rollout, outcome, store, streamer)
        except asyncio.CancelledError:
            # Nobody else will ever end this rollout.
            await asyncio.shield(store.cancel_rollouts([rollout.rollout_id], reason="the step was cancelled"))
            raise
        ended = await store.get_rollout_by_id(rollout.rollout_id)
        assert ended is not None, "a rollout that was just executed has been deleted"
        return ended

    async def iter(self, event: StopEvent | None = None) -> None:
        """Takes and executes rollouts until `event` is set or `max_rollouts` are done; then drains."""
        agent, store, _ = self._ready()
        config = RunnerConfig(
            agent=agent,
            store=store.target,
            run_id=store.run_id,
            queues=self._queues,
            concurrency=self._concurrency,
            drain_seconds=self._drain_seconds,
            heartbeat_seconds=self._heartbeat_interval,
            max_rollouts=self._max_rollouts,
            name=self._worker_id,
        )
        worker = Worker(config, self._worker_id, agent, self._hooks, tracer=self.tracer)
        watch = asyncio.create_task(_drain_at(event, worker))
        try:
            await worker.run()
        finally:
            watch.cancel()
            # The worker's stream of spans has ended with it; `step` goes on with ours.
            self.tracer.init_worker(self._worker_id, self._streamer)

    def _ready(self) -> tuple[LitAgent[Any], StoreClient, SpanStreamer]:
        if self._agent is None or self._store is None or self._streamer is None:
            raise RuntimeError("the runner is not ready: use run_context, or call init and init_worker first")
        return self._agent, self._store, self._streamer

    async def _published(self, store: StoreClient, rollout: AttemptedRollout) -> NamedResources:
        if rollout.resources_id is None:
            return {}
        update = await store.get_resources_by_id(rollout.resources_id)
        return {} if update is None else update.resources

    async def _deliver(
        self, rollout: AttemptedRollout, outcome: Outcome, store: StoreClient, streamer: SpanStreamer
    ) -> None:
        attempt_id = rollout.attempt.attempt_id
        if outcome.spans:
            await streamer.send(
                SpanGroup(rollout_id=rollout.rollout_id, attempt_id=attempt_id, spans=outcome.spans)
            )
        await streamer.flush()
        await store.put_rewards(rewards_of(outcome, rollout.rollout_id, attempt_id))
        if outcome.failure is None:
            await store.update_attempt(rollout.rollout_id, attempt_id, AttemptStatus.SUCCEEDED)
        else:
            await store.update_attempt(
                rollout.rollout_id, attempt_id, AttemptStatus.FAILED, failure=outcome.failure
            )


async def _drain_at(event: StopEvent | None, worker: Worker) -> None:
    if event is None:
        return
    if isinstance(event, asyncio.Event):
        await event.wait()
    while not event.is_set():  # noqa: ASYNC110  # events of threads and processes cannot be awaited
        await asyncio.sleep(_LOOK_SECONDS)
    worker.drain("its stop event is set")
