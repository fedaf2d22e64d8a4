"""The inner side of isolation `process`: a process that runs the agent on one attempt at a time."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from agl_grpc.client import SpanAck, SpanGroup
from agl_grpc.model.enums import Durability
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.executor import Executor, Task
from agl_grpc.runner.failures import failure_of
from agl_grpc.runner.load import LoadError, load_agent, load_hooks, load_tracer
from agl_grpc.runner.logs import configure_logging
from agl_grpc.runner.outcome import Outcome
from agl_grpc.runner.parent import signal_when_parent_dies
from agl_grpc.runner.threads import AbandonedThreads
from agl_grpc.tracer import Tracer

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Ready:
    """The agent is loaded; refused says why it never will be, empty = it is."""

    refused: str = ""


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans that ended; what comes before the end of their attempt."""

    group: SpanGroup


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt is over; outcome None = it was stopped."""

    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Stop:
    """To the process: stop the agent."""


# Without slots: agents hold their runner by a weak reference.
@dataclass(frozen=True)
class ProcessRunner:
    """What hooks and agents see as their runner."""

    worker_id: str
    tracer: Tracer


class _Link:
    """The pipe to the worker; its methods may be called from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def submit(self, groups: SpanGroup) -> Future[SpanAck]:
        """As `SpanStreamer.submit`; the worker brings the spans to disk before it completes the attempt."""
        self.send(Spans(groups))
        done: Future[SpanAck] = Future()
        done.set_result(SpanAck(durability=Durability.MEMORY))
        return done


def run_agent_process(config: RunnerConfig, worker_id: str, connection: Connection) -> None:
    """Loads the agent and runs it on what comes through the pipe, until the worker closes it."""
    # A session of its own: whatever the agent starts is killed with it.
    os.setsid()
    # A hung agent must not outlive a worker that was killed. Elsewhere the closed pipe ends it.
    signal_when_parent_dies(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(config.log_level)
    link = _Link(connection)
    try:
        agent = load_agent(config.agent, config.app_dir)
        hooks = load_hooks(config.hooks, config.app_dir)
        tracer = load_tracer(config.tracer, config.app_dir)
    except LoadError as error:
        link.send(Ready(str(error)))
        return
    tracer.init_worker(worker_id, link)
    abandoned = AbandonedThreads()
    executor = Executor(agent, tracer, hooks, ProcessRunner(worker_id, tracer), abandoned)
    link.send(Ready())
    asyncio.run(_Server(connection, link, executor, abandoned).serve())
    logging.shutdown()
    # Threads that the agent left running must not keep the process.
    os._exit(0)


class _Server:
    """Runs attempts, one after the other, on this process's event loop."""

    def __init__(
        self, connection: Connection, link: _Link, executor: Executor, abandoned: AbandonedThreads
    ) -> None:
        self._connection = connection
        self._link = link
        self._executor = executor
        self._abandoned = abandoned
        self._running: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def serve(self) -> None:
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)
        await self._gone.wait()

    def _receive(self) -> None:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._gone.set()
            return
        if isinstance(message, Stop):
            if self._running is not None:
                self._running.cancel()
        else:
            self._running = asyncio.create_task(self._execute(message))

    async def _execute(self, task: Task) -> None:
        try:
            outcome: Outcome | None = await self._executor.execute(task)
        except asyncio.CancelledError:
            outcome = None
            while self._abandoned.count():  # noqa: ASYNC110  # the worker kills this process if it takes long
                await asyncio.sleep(_LOOK_SECONDS)
        except Exception as error:
            log.exception("a defect outside the agent ended attempt %s", task.rollout.attempt.attempt_id)
            outcome = Outcome(failure=failure_of(error))
        try:
            self._link.send(Ended(outcome))
        except (BrokenPipeError, ConnectionResetError):
            self._gone.set()
