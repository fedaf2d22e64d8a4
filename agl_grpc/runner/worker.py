"""One worker: takes leased rollouts from the store, runs the agent on them, gives the results back."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from agl_grpc.agent import LitAgent
from agl_grpc.client import (
    Completion,
    IllegalTransition,
    LeasedRollout,
    LeaseLost,
    LeaseStream,
    NotFound,
    NotPermitted,
    RetryPolicy,
    SpanStreamer,
    StoreClient,
    StoreError,
    StoreUnavailable,
)
from agl_grpc.client.lease_events import (
    Commanded,
    Connected,
    Delivered,
    Disconnected,
    Idle,
    LeaseEnded,
    LeaseEvent,
)
from agl_grpc.model import (
    AttemptStatus,
    CommandKind,
    Failure,
    FailureKind,
    WorkerCommand,
    WorkerStatus,
)
from agl_grpc.runner.agent_loop import AgentLoop
from agl_grpc.runner.attend import STOP_SECONDS, Attendant
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.executor import Execution, Executor
from agl_grpc.runner.heartbeat import Heartbeat
from agl_grpc.runner.held import Held, StopReason
from agl_grpc.runner.hooks import Hook
from agl_grpc.runner.process_pool import ProcessPool
from agl_grpc.runner.threads import AbandonedThreads
from agl_grpc.tracer import OtelTracer, Tracer

log = logging.getLogger(__name__)

CONNECTING = "connecting"

PATIENCE_SECONDS = 2.0
"""How long a worker tries to reach the store before it says that it waits."""

FAREWELL_SECONDS = 10.0
"""How long a leaving worker tries to deliver what has finished and to hand back the rest."""

LEFT_BEHIND_LIMIT = 8
"""A worker with so many agents that would not stop leaves, so that a fresh process takes its place."""

# Results wait for a store that is away as long as the store knows the request id of the first try.
RESULTS = RetryPolicy(timeout=24 * 3600.0)


class Worker:
    """A worker of one process and one event loop; `run` returns when it has left.

    Without an `agent` each rollout runs in a process of its own, which loads the agent that `config` names.
    `drain` and `release_now` may be called any time on the loop. `worn_out` tells whether it left because of
    agents that would not stop; `on_first_rollout` is called when it takes its first one.
    """

    def __init__(
        self,
        config: RunnerConfig,
        worker_id: str,
        agent: LitAgent[Any] | None,
        hooks: Sequence[Hook] = (),
        tracer: Tracer | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.tracer: Tracer = tracer or OtelTracer()
        self.worn_out = False
        self.on_first_rollout: Callable[[], None] = lambda: None
        self._drain_order: int | None = None
        self._idle_reason = CONNECTING
        self._config = config
        self._held: dict[str, Held] = {}
        self._attending: set[asyncio.Task[None]] = set()
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._abandoned = AbandonedThreads()
        self._credits_left = config.max_rollouts
        self._withheld = config.concurrency
        self._background: set[asyncio.Task[None]] = set()
        self._taken = 0
        # Whether completions may bring spans along: what the store that is connected now says of itself.
        self._carries_spans = False
        self._leave = asyncio.Event()
        self._release = asyncio.Event()
        session = uuid.uuid4().hex
        self._client = StoreClient(config.store, run_id=config.run_id, retry=RESULTS)
        self._streamer = SpanStreamer(self._client, producer_id=f"{self.worker_id}/{session}")
        self._heartbeat = Heartbeat(self._client, self, config.heartbeat_seconds)
        self._stream = LeaseStream(
            self._client,
            worker_id=self.worker_id,
            session_id=session,
            queues=config.queues,
            labels=config.labels,
            lease_duration=config.lease_seconds,
        )
        self._execution: Execution
        if agent is None:
            self._execution = ProcessPool(config, worker_id, self._streamer)
        else:
            self._execution = Executor(
                agent, self.tracer, hooks, self, self._abandoned, lambda: self._carries_spans
            )
        self._agents = AgentLoop()
        self._attendant = Attendant(
            self._execution,
            self._agents,
            self._streamer,
            self._client.load,
            self._agent_ended,
            self._leave_behind,
            lambda: self._carries_spans,
        )

    @property
    def status(self) -> WorkerStatus:
        """What the worker does now."""
        if self._leave.is_set():
            return WorkerStatus.DRAINING
        return WorkerStatus.BUSY if self._held else WorkerStatus.IDLE

    @property
    def leaving(self) -> bool:
        """Whether it takes nothing new any more."""
        return self._leave.is_set()

    @property
    def idle_reason(self) -> str:
        """Why the worker idles; empty while it holds rollouts."""
        return "" if self._held else self._idle_reason

    def drain(self, reason: str) -> None:
        """Takes nothing new; `run` returns when what is held has ended, or is handed back after the grace."""
        if self._leave.is_set():
            return
        log.info("%s drains (%s): %d rollouts in hand", self.worker_id, reason, len(self._held))
        self._stream.drain(reason)
        self._leave.set()
        self._heartbeat.soon()

    def release_now(self) -> None:
        """As `drain`, without waiting for the agents."""
        self.drain("leaving at once")
        self._release.set()

    async def run(self) -> None:
        """Works until told to leave.

        Raises:
            StoreError: the store will never serve this worker, for example as a queue's name is not valid.
            LoadError: the agent's processes cannot load it.
        """
        await self._agents.run(self._execution.start)
        self.tracer.init_worker(self.worker_id, self._streamer.start())
        if not self._config.wait_for_resources:
            self._grant_first()
        events = asyncio.create_task(self._follow(), name=f"{self.worker_id} events")
        asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._say_if_waiting)
        beats = asyncio.create_task(self._heartbeat.run(), name=f"{self.worker_id} heartbeats")
        leave = asyncio.create_task(self._leave.wait())
        try:
            await asyncio.wait({events, beats, leave}, return_when=asyncio.FIRST_COMPLETED)
            if leave.done():
                await self._finish()
            for ended in (events, beats):
                if ended.done():
                    ended.result()
        finally:
            for task in (events, beats, leave):
                task.cancel()
            await asyncio.gather(events, beats, leave, return_exceptions=True)
            await self._say_farewell()

    def _say_if_waiting(self) -> None:
        if self._idle_reason == CONNECTING:
            log.warning("%s waits for the store at %s", self.worker_id, self._config.store)

    async def _follow(self) -> None:
        # Workers may be there before whoever fills the run.
        try:
            await self._client.create_run(self._config.run_id)
        except NotPermitted as error:
            log.info("%s makes no run, which has to be there: %s", self.worker_id, error)
        self._stream.start()
        async for event in self._stream:
            self._react(event)

    def _react(self, event: LeaseEvent) -> None:
        match event:
            case Delivered(work):
                self._take(work)
            case LeaseEnded(_, attempt_id, error):
                self._stop(attempt_id, StopReason.LOST, str(error or ""))
            case Commanded(command):
                self._obey(command)
            case Idle(reason):
                self._idle(reason)
            case Connected():
                log.info("%s is connected to the store at %s", self.worker_id, self._config.store)
                self._greeted()
            case Disconnected(reason):
                log.warning(
                    "the store is away (%s): %d rollouts go on, their results are kept",
                    reason,
                    len(self._held),
                )
                self._carries_spans = False
                self._idle("the store is away")

    def _greeted(self) -> None:
        self._beside(self._look_at_store(), "store")
        if not self._withheld:
            self._idle("no work")
            return
        self._idle("no resources")
        # Only now: what is published from here on is announced on the stream.
        self._beside(self._look_for_resources(), "resources")

    def _beside(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"{self.worker_id} {what}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _look_at_store(self) -> None:
        try:
            info = await self._client.get_server_info()
        except StoreError as error:
            log.warning("%s cannot ask the store what it is capable of: %s", self.worker_id, error)
        else:
            self._carries_spans = "completion_spans" in info.capabilities

    async def _look_for_resources(self) -> None:
        try:
            if await self._client.get_latest_resources() is not None:
                self._grant_first()
        except StoreError as error:
            log.warning("%s cannot read the run's resources: %s", self.worker_id, error)

    def _grant_first(self) -> None:
        withheld, self._withheld = self._withheld, 0
        self._grant(withheld)

    def _take(self, work: LeasedRollout) -> None:
        held = Held(work)
        self._taken += 1
        if self._taken == 1:
            self.on_first_rollout()
        self._held[held.attempt_id] = held
        log.debug("took attempt %s of %s", held.attempt_id, held.rollout_id)
        task = asyncio.create_task(self._attend(held), name=f"attend {held.attempt_id}")
        self._attending.add(task)
        task.add_done_callback(self._attended)

    async def _attend(self, held: Held) -> None:
        try:
            completion = await self._attendant.attend(held)
            if completion is not None:
                await self._deliver(completion)
        finally:
            del self._held[held.attempt_id]

    async def _deliver(self, completion: Completion) -> None:
        try:
            await self._stream.complete(completion)
        except (LeaseLost, NotFound, IllegalTransition) as error:
            log.warning("the result of attempt %s came too late: %s", completion.lease.attempt_id, error)
        except StoreError as error:
            log.error("the result of attempt %s is refused: %s", completion.lease.attempt_id, error)
            await self._deliver_refusal(completion, error)

    async def _deliver_refusal(self, completion: Completion, refusal: StoreError) -> None:
        # A rollout must not hang on a result that the store will never take.
        failure = Failure(
            kind=FailureKind.AGENT, type=type(refusal).__name__, message=f"the result is refused: {refusal}"
        )
        refused = Completion(
            lease=completion.lease, status=AttemptStatus.FAILED, failure=failure, spans=completion.spans
        )
        try:
            await self._stream.complete(refused)
        except StoreError as error:
            log.error("attempt %s is handed back: %s", completion.lease.attempt_id, error)
            await self._stream.release([completion.lease], reason=str(error))

    def _attended(self, task: asyncio.Task[None]) -> None:
        self._attending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the worker is broken and leaves", exc_info=error)
            self.worn_out = True
            self.release_now()
        if self._taken == self._config.max_rollouts and not self._attending:
            self.drain(f"{self._taken} rollouts were executed")

    def _stop(self, attempt_id: str, reason: StopReason, detail: str) -> None:
        held = self._held.get(attempt_id)
        if held is not None and not held.ended:
            log.warning("attempt %s is stopped: %s. %s", attempt_id, reason.value, detail)
            held.stop_because(reason)

    def _obey(self, command: WorkerCommand) -> None:
        match command.kind:
            case CommandKind.CANCEL:
                self._stop(command.attempt_id, StopReason.CANCELLED, command.reason)
            case CommandKind.DRAIN:
                self._drain_order = command.command_id
                self.drain(command.reason or "the store asked for it")
            case CommandKind.RESOURCES:
                # Each delivery brings the resources that its rollout is bound to: nothing to fetch.
                log.info("resources %s@%d are published", command.resources_id, command.resources_version)
                self._grant_first()
        self._stream.acknowledge(command)

    def _idle(self, reason: str) -> None:
        if reason == self._idle_reason:
            return
        self._idle_reason = reason
        if not self._held:
            log.info("%s idles: %s", self.worker_id, reason)
            self._heartbeat.soon()

    def _grant(self, credits: int) -> None:
        if self._credits_left is not None:
            credits = min(credits, self._credits_left)
            self._credits_left -= credits
        if credits and not self._leave.is_set():
            self._stream.grant(credits)

    def _agent_ended(self) -> None:
        self._grant(1)
        if self._abandoned.count():
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._check_wear)

    def _leave_behind(self, agent: asyncio.Task[Any]) -> None:
        self._left_behind.add(agent)
        agent.add_done_callback(self._left_behind.discard)
        self._check_wear()

    def _check_wear(self) -> None:
        count = len(self._left_behind) + self._abandoned.count()
        if count:
            log.warning("%d agents were told to stop and still run", count)
        if count >= LEFT_BEHIND_LIMIT:
            self.worn_out = True
            self.drain(f"{count} agents would not stop")

    async def _finish(self) -> None:
        """Lets the agents end, or hands their rollouts back when the grace is over."""
        release = asyncio.create_task(self._release.wait())
        try:
            async with asyncio.timeout(self._config.drain_seconds):
                while self._attending and not release.done():
                    await asyncio.wait({release, *self._attending}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            log.warning("the grace of %g s is over", self._config.drain_seconds)
        finally:
            release.cancel()
        for held in self._held.values():
            if not held.ended:
                held.stop_because(StopReason.RELEASED)
        if self._attending:
            await asyncio.wait(self._attending, timeout=FAREWELL_SECONDS)

    async def _confirm_drain(self) -> None:
        # The stream may have closed before its acknowledgement was written, and an order that stays would
        # send away the next worker of this name.
        if self._drain_order is not None:
            await self._client.renew_leases(self.worker_id, [], acknowledged_command_ids=[self._drain_order])

    async def _say_farewell(self) -> None:
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                connected = self._stream.connected
                await self._stream.close()
                self._held.clear()
                if connected:
                    await self._confirm_drain()
                    self._idle_reason = "it has left"
                    await self._heartbeat.beat()
        except (TimeoutError, StoreUnavailable):
            log.warning(
                "%s leaves while the store is away: %d leases run out by themselves",
                self.worker_id, len(self._stream.held),
            )  # fmt: skip
        finally:
            unfinished = self._attending | self._background
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            await self.tracer.teardown_worker(self.worker_id)
            await self._streamer.close(timeout=FAREWELL_SECONDS)
            await self._client.close()
            await self._agents.run(self._execution.close)
            self._agents.close()
