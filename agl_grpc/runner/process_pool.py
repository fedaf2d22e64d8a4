"""Isolation `process`: each rollout in a process of its own, reused by the next one unless it was stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from agl_grpc.client import SpanStreamer
from agl_grpc.model import Failure, FailureKind
from agl_grpc.runner.child import Ended, Ready, Spans, Stop, run_agent_process
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.executor import Task
from agl_grpc.runner.exits import describe_exit
from agl_grpc.runner.load import LoadError
from agl_grpc.runner.outcome import Outcome

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How long an agent may take to clean up after it was told to stop, before its process is killed."""

_EXIT_SECONDS = 5.0


class ProcessPool:
    """Executes attempts in processes that load the agent themselves; as many as run at once.

    A process serves one attempt at a time, and the next one afterwards. One whose attempt was cancelled or
    timed out is killed, with everything that its agent has started. Their spans go through `streamer`.
    """

    def __init__(self, config: RunnerConfig, worker_id: str, streamer: SpanStreamer) -> None:
        self._config = config
        self._worker_id = worker_id
        self._streamer = streamer
        # Processes are forked from a server that has nothing running: quick, and safe beside threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["agl_grpc.runner.child"])
        self._all: set[_AgentProcess] = set()
        self._free: list[_AgentProcess] = []

    async def start(self) -> None:
        """Starts the first process.

        Raises:
            LoadError: the agent cannot be loaded.
        """
        self._free.append(await self._new())

    async def execute(self, task: Task) -> Outcome:
        """Runs one attempt; a process that dies fails it, and nothing else."""
        try:
            process = self._take() or await self._new()
        except LoadError as error:
            return Outcome(
                failure=Failure(kind=FailureKind.INFRASTRUCTURE, type="LoadError", message=str(error))
            )
        try:
            outcome = await process.run(task)
        except BaseException:
            await asyncio.shield(self._end(process))
            raise
        if process.dead:
            self._all.discard(process)
        else:
            self._free.append(process)
        return outcome

    async def close(self) -> None:
        """Kills all processes."""
        await asyncio.gather(*(self._end(process) for process in list(self._all)))

    def _take(self) -> _AgentProcess | None:
        while self._free:
            process = self._free.pop()
            if not process.dead:
                return process
            self._all.discard(process)
        return None

    async def _new(self) -> _AgentProcess:
        process = _AgentProcess(self._streamer)
        self._all.add(process)
        try:
            await process.start(self._context, self._config, self._worker_id)
        except BaseException:
            await asyncio.shield(self._end(process))
            raise
        return process

    async def _end(self, process: _AgentProcess) -> None:
        self._all.discard(process)
        await process.kill()


class _AgentProcess:
    """One process, seen from the worker."""

    def __init__(self, streamer: SpanStreamer) -> None:
        self._streamer = streamer
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self._answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.dead = False

    async def start(self, context: Any, config: RunnerConfig, worker_id: str) -> None:
        """Starts it and waits until it has loaded the agent; raises `LoadError`."""
        self._link, theirs = context.Pipe()
        self._process = context.Process(
            target=run_agent_process, args=(config, worker_id, theirs), name=f"{worker_id} agent"
        )
        await asyncio.to_thread(self._process.start)
        theirs.close()
        asyncio.get_running_loop().add_reader(self._link.fileno(), self._receive)
        ready = await self._answer
        if not isinstance(ready, Ready):
            raise LoadError(f"the agent's process {await self._obituary()} while it loaded the agent")
        if ready.refused:
            raise LoadError(ready.refused)

    async def run(self, task: Task) -> Outcome:
        """Has the attempt executed; cancelled, it tells the agent to stop and gives it a moment."""
        assert self._link is not None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._link.send(task)
        except OSError:
            return await self._died()
        try:
            ended = await asyncio.shield(self._answer)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                self._link.send(Stop())
            await asyncio.wait({self._answer}, timeout=GRACE_SECONDS)
            raise
        if isinstance(ended, Ended) and ended.outcome is not None:
            return ended.outcome
        return await self._died()

    async def kill(self) -> None:
        """Kills the process and all that it started."""
        self._lost()
        process = self._process
        if process is None or process.pid is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        await asyncio.to_thread(process.join, _EXIT_SECONDS)

    def _receive(self) -> None:
        assert self._link is not None
        try:
            message = self._link.recv()
        except (EOFError, OSError):
            self._lost()
            return
        if isinstance(message, Spans):
            # Before the outcome, which follows on the same pipe: the worker's flush waits for them.
            self._streamer.submit(message.group)
        elif not self._answer.done():
            self._answer.set_result(message)

    def _lost(self) -> None:
        self.dead = True
        if self._link is not None and not self._link.closed:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._link.close()
        if not self._answer.done():
            self._answer.set_result(None)

    async def _died(self) -> Outcome:
        self._lost()
        story = await self._obituary()
        await self.kill()
        code = None if self._process is None else self._process.exitcode
        # SIGKILL comes from outside, most often from a system that has run out of memory: another worker
        # may have more. Any other death is the agent's own doing.
        kind = FailureKind.INFRASTRUCTURE if code == -signal.SIGKILL else FailureKind.AGENT
        log.warning("an agent's process %s", story)
        return Outcome(failure=Failure(kind=kind, type="ProcessDied", message=f"the agent's process {story}"))

    async def _obituary(self) -> str:
        assert self._process is not None
        await asyncio.to_thread(self._process.join, _EXIT_SECONDS)
        return describe_exit(self._process.exitcode)
