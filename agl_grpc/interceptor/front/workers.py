"""A proxy of several processes: started, watched, started again, ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from agl_grpc.interceptor.capture.spool import gather, hold
from agl_grpc.interceptor.front.peers import Share
from agl_grpc.interceptor.front.server import listen, url_of
from agl_grpc.interceptor.front.settings import ProxySettings, UpstreamSpec

logger = logging.getLogger("agl_grpc.interceptor")

_START_SECONDS = 60.0
_SHORT_LIFE = 2.0
_MOST_SHORT_LIVES = 3
"""A process that ends so soon after it served, so often in a row, would end again."""

Prepare = Callable[[], None] | None
Work = Callable[[ProxySettings, Sequence[UpstreamSpec], Share, "Path | None", Connection, Prepare], None]


class WorkersFailed(Exception):
    """The proxy cannot go on; the message is one line."""


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    since: float
    short_lives: int = 0


class Workers:
    """The processes of one proxy.

    Args:
        settings: of the proxy as a whole: each process has its share of the spool and of the requests.
        upstreams: engines named at the start.
        upstreams_file: more of them, or None.
        work: what each process does; it says "ready" on its pipe, and ends when that closes.
        prepare: called first in each process; picklable.
    """

    def __init__(
        self,
        settings: ProxySettings,
        upstreams: Sequence[UpstreamSpec],
        upstreams_file: Path | None,
        work: Work,
        prepare: Prepare,
    ) -> None:
        self._settings = settings
        self._arguments = (list(upstreams), upstreams_file, prepare)
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._signals: list[int] = []

    def run(self, host: str, port: int, count: int) -> None:
        """Serve until SIGTERM or Ctrl-C. Raises WorkersFailed, SpoolInUse and OSError."""
        listening = listen(host, port)
        folder = self._settings.spool_path(listening.getsockname()[1])
        with hold(folder), contextlib.closing(listening), _woken(self._signals) as woken:
            gather(folder, count)
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
            sending = [pair[0] for pair in pairs]
            shares = [Share(n, listening, pairs[n][1], sending) for n in range(count)]
            try:
                self._workers = [self._start(share, folder) for share in shares]
                for worker in self._workers:
                    _await_ready(worker)
                engines, store = len(self._arguments[0]), self._settings.store
                where = f"{url_of(listening)}, {engines} upstreams, store {store}"
                print(f"agl-grpc proxy: {where}, {count} processes", flush=True)
                self._watch(shares, folder, woken)
            finally:
                self._end()

    def _start(self, share: Share, folder: Path) -> _Worker:
        upstreams, upstreams_file, prepare = self._arguments
        count = len(share.sending)
        settings = dataclasses.replace(
            self._settings,
            spool_dir=str(folder / f"worker-{share.number}"),
            spool_bytes=self._settings.spool_bytes // count,
            max_in_flight=-(-self._settings.max_in_flight // count),
        )
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=self._work,
            args=(settings, upstreams, share, upstreams_file, theirs, prepare),
            name=f"agl-grpc-proxy-{share.number}",
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic())

    def _watch(self, shares: Sequence[Share], folder: Path, woken: socket.socket) -> None:
        while True:
            ready = wait([woken, *(worker.process.sentinel for worker in self._workers)])
            if woken in ready:
                woken.recv(64)
            while self._signals:
                if self._signals.pop(0) != signal.SIGHUP:
                    return
                self._tell_all(signal.SIGHUP)
            for number, worker in enumerate(self._workers):
                if worker.process.sentinel in ready:
                    self._workers[number] = self._again(worker, shares[number], folder)

    def _again(self, dead: _Worker, share: Share, folder: Path) -> _Worker:
        """A new process in the place of one that has died: it delivers what that one left in its spool."""
        dead.process.join()
        dead.pipe.close()
        code = dead.process.exitcode
        short = dead.short_lives + 1 if time.monotonic() - dead.since < _SHORT_LIFE else 0
        if short >= _MOST_SHORT_LIVES:
            raise WorkersFailed(
                f"process {share.number} ended with {code} as soon as it served, {short} times"
            )
        logger.error("process %d ended with %s: started again", share.number, code)
        worker = self._start(share, folder)
        _await_ready(worker)
        return worker._replace(since=time.monotonic(), short_lives=short)

    def _tell_all(self, number: int) -> None:
        for worker in self._workers:
            if worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, number)

    def _end(self) -> None:
        """All end as one process does: running answers first."""
        self._tell_all(signal.SIGTERM)
        until = time.monotonic() + self._settings.drain_timeout + 20.0
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


def _await_ready(worker: _Worker) -> None:
    wait([worker.pipe, worker.process.sentinel], _START_SECONDS)
    try:
        said = worker.pipe.recv() if worker.pipe.poll() else "it says nothing"
    except EOFError:
        said = "it ended"
    if said != "ready":
        raise WorkersFailed(f"a process of the proxy did not start: {said}")


@contextlib.contextmanager
def _woken(signals: list[int]) -> Iterator[socket.socket]:
    """A socket on which something can be read once a signal has come; which ones is appended."""
    reading, writing = socket.socketpair()

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        writing.send(b".")

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield reading
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        reading.close()
        writing.close()
