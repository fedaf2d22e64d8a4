"""The parent of worker processes: starts them, restarts those that die, passes signals on."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.exits import describe_exit
from agl_grpc.runner.process import EXIT_FATAL, EXIT_RECYCLE, TOOK, run_worker_process
from agl_grpc.runner.restarts import Start, WorkerStartError, end_leases, start_again
from agl_grpc.runner.signals import stopping_at_signals
from agl_grpc.runner.sweep import end_programs

log = logging.getLogger(__name__)

_END_LEASES_SECONDS = 10.0


@dataclass(slots=True)
class _Child:
    index: int
    process: BaseProcess
    reports: Connection
    started: float
    start: Start
    took: bool = False
    report: str = ""

    def read_reports(self) -> None:
        """Reads what the worker has said."""
        with contextlib.suppress(EOFError):
            while self.reports.poll():
                said = str(self.reports.recv())
                if said == TOOK:
                    self.took = True
                else:
                    self.report = said


class Supervisor:
    """Runs `config.workers` worker processes until they have all left or `stop` is called.

    A worker that dies is restarted after `config.restart_seconds`, doubling up to 30 s; its leases are ended
    at once, so that its rollouts are delivered elsewhere without waiting for their expiry, and programs
    that it left running are killed. A worker that dies again and again before it takes a rollout will never
    work: all stop. One that ends with one of `config.allowed_exit_codes` has left and is not restarted.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self._config = config
        self._context: Any = multiprocessing.get_context(config.start_method)
        self._children: dict[int, _Child] = {}
        self._due: dict[int, Start] = {}
        self._stops = 0
        self._passed_on = 0
        self._wake_end, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [child.process.pid for child in self._children.values() if child.process.pid is not None]

    def stop(self) -> None:
        """Asks all workers to drain; asked a second time, to hand back what they hold at once. Any thread."""
        self._stops += 1
        # Full: the loop is about to look anyway. Closed: all workers have left.
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def run(self) -> None:
        """Returns when every worker has left.

        SIGTERM and SIGINT call `stop` while it runs, when it runs in the main thread.

        Raises:
            WorkerStartError: a worker cannot run at all; the others have been stopped.
        """
        with stopping_at_signals(self.stop):
            try:
                for index in range(self._config.workers):
                    self._start(index, Start())
                while self._children or self._due:
                    self._wait()
                    self._collect()
                    self._pass_on_stops()
                    self._restart_due()
            finally:
                self._kill_all()
                self._wake_end.close()
                self._waker.close()

    def _start(self, index: int, due: Start) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=run_worker_process,
            args=(self._config, index, theirs),
            name=self._config.worker_id(index),
        )
        process.start()
        theirs.close()
        log.info("worker %s started (pid %d)", process.name, process.pid)
        self._children[index] = _Child(index, process, ours, time.monotonic(), due)

    def _wait(self) -> None:
        watched: list[int | socket.socket] = [child.process.sentinel for child in self._children.values()]
        pause = None
        if self._due:
            pause = max(0.0, min(due.due for due in self._due.values()) - time.monotonic())
        if self._wake_end in wait([*watched, self._wake_end], pause):
            self._wake_end.recv(4096)

    def _collect(self) -> None:
        for child in [child for child in self._children.values() if child.process.exitcode is not None]:
            del self._children[child.index]
            child.process.join()
            child.read_reports()
            child.reports.close()
            self._judge(child, child.process.exitcode or 0)

    def _judge(self, child: _Child, code: int) -> None:
        name = child.process.name
        if code == 0:
            log.info("worker %s left", name)
            return
        # Without a report it was the agent that exited with this code.
        if code == EXIT_FATAL and child.report:
            raise WorkerStartError(child.report)
        self._end_leases(name)
        if child.process.pid is not None:
            end_programs(child.process.pid)
        if self._stops:
            log.warning("worker %s %s while it was stopping", name, describe_exit(code))
            return
        if code in self._config.allowed_exit_codes:
            log.info("worker %s left: it %s, which is allowed", name, describe_exit(code))
            return
        if code == EXIT_RECYCLE and child.report:
            log.warning("worker %s is replaced: %s", name, child.report)
            self._due[child.index] = Start()
            return
        lived = time.monotonic() - child.started
        death = f"(pid {child.process.pid}) {describe_exit(code)}"
        self._due[child.index] = start_again(
            self._config, name, child.start, lived=lived, took=child.took, death=death
        )

    def _restart_due(self) -> None:
        if self._stops:
            self._due.clear()
        for index, due in list(self._due.items()):
            if due.due <= time.monotonic():
                del self._due[index]
                self._start(index, due)

    def _pass_on_stops(self) -> None:
        if self._passed_on == self._stops:
            return
        self._passed_on = self._stops
        for child in self._children.values():
            child.process.terminate()

    def _kill_all(self) -> None:
        for child in self._children.values():
            child.process.kill()
        for child in self._children.values():
            child.process.join()
            child.reports.close()
        self._children.clear()

    def _end_leases(self, worker_id: str) -> None:
        if self._config.start_method != "fork":
            end_leases(self._config.store, worker_id)
            return
        # Workers are copies of this process, which therefore must not use gRPC itself.
        process = self._context.Process(target=end_leases, args=(self._config.store, worker_id))
        process.start()
        process.join(_END_LEASES_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
