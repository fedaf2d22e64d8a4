"""A proxy as a process: signals, log, the line that says where it is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from agl_grpc.interceptor.capture.spool import SpoolInUse
from agl_grpc.interceptor.front.peers import Share
from agl_grpc.interceptor.front.server import Proxy
from agl_grpc.interceptor.front.settings import BadUpstream, ProxySettings, UpstreamSpec, read_upstreams
from agl_grpc.interceptor.front.workers import Workers

logger = logging.getLogger("agl_grpc.interceptor")


_GC_THRESHOLD = 100_000


def run_proxy(
    settings: ProxySettings,
    upstreams: Sequence[UpstreamSpec],
    host: str,
    port: int,
    *,
    upstreams_file: Path | None = None,
    workers: int = 1,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; SIGHUP reads the file of upstreams again.

    With more than one of `workers`, each process calls `prepare` first (which must be picklable).

    Raises BadUpstream, SpoolInUse, WorkersFailed and OSError for what is wrong at the start.
    """
    _raise_file_limit()
    if workers > 1:
        _specs(upstreams, upstreams_file)
        Workers(settings, upstreams, upstreams_file, _work, prepare).run(host, port, workers)
        return

    async def serve() -> None:
        proxy = await Proxy.start(settings, _specs(upstreams, upstreams_file), host, port)
        number = len(proxy.describe()["upstreams"])
        print(f"agl-grpc proxy: {proxy.url}, {number} upstreams, store {settings.store}", flush=True)
        await _until_told(proxy, upstreams, upstreams_file)

    _collect_rarely()
    uvloop.run(serve())


def _work(
    settings: ProxySettings,
    upstreams: Sequence[UpstreamSpec],
    share: Share,
    upstreams_file: Path | None,
    pipe: Connection,
    prepare: Callable[[], None] | None,
) -> None:
    """One of several processes; it ends when the one that started it has."""
    if prepare is not None:
        prepare()

    async def serve() -> None:
        host, port = share.listening.getsockname()[:2]
        proxy = await Proxy.start(settings, _specs(upstreams, upstreams_file), host, port, share)
        pipe.send("ready")
        await _until_told(proxy, upstreams, upstreams_file, pipe.fileno())

    _collect_rarely()
    try:
        uvloop.run(serve())
    except (SpoolInUse, BadUpstream, OSError) as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(str(error))
        raise SystemExit(1) from None


def _raise_file_limit() -> None:
    # Two connections for each request under way: the usual limit of 1,024 files would be the first to be hit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _collect_rarely() -> None:
    # Answers are parsed into tens of thousands of objects without a cycle among them, which the collector
    # would look through again and again.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 50, 100)


def _specs(upstreams: Sequence[UpstreamSpec], upstreams_file: Path | None) -> list[UpstreamSpec]:
    return [*upstreams, *(read_upstreams(upstreams_file) if upstreams_file else ())]


async def _until_told(
    proxy: Proxy, upstreams: Sequence[UpstreamSpec], upstreams_file: Path | None, parent: int | None = None
) -> None:
    """Serve until a signal, or until something can be read from `parent`; then stop."""

    def reload() -> None:
        try:
            specs = _specs(upstreams, upstreams_file)
            proxy.set_upstreams(specs)
            logger.warning("upstreams read again: %d", len(specs))
        except (OSError, BadUpstream) as error:
            logger.error("upstreams stay as they are: %s", error)

    def end() -> None:
        if parent is not None:
            loop.remove_reader(parent)
        ended.set()

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, reload)
    if parent is not None:
        loop.add_reader(parent, end)
    try:
        await ended.wait()
    finally:
        await proxy.stop()
