"""A proxy as a process: signals, log, the line that says where it is."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

import uvloop

from agl_grpc.interceptor.front.server import Proxy
from agl_grpc.interceptor.front.settings import BadUpstream, ProxySettings, UpstreamSpec, read_upstreams

logger = logging.getLogger("agl_grpc.interceptor")


_GC_THRESHOLD = 100_000


def run_proxy(
    settings: ProxySettings,
    upstreams: Sequence[UpstreamSpec],
    host: str,
    port: int,
    *,
    upstreams_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; SIGHUP reads the file of upstreams again.

    Raises BadUpstream, SpoolInUse and OSError for what is wrong at the start.
    """
    # Two connections for each request under way: the usual limit of 1,024 files would be the first to be hit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_serve(settings, upstreams, host, port, upstreams_file))


async def _serve(
    settings: ProxySettings,
    upstreams: Sequence[UpstreamSpec],
    host: str,
    port: int,
    upstreams_file: Path | None,
) -> None:
    def specs() -> list[UpstreamSpec]:
        return [*upstreams, *(read_upstreams(upstreams_file) if upstreams_file else ())]

    def reload() -> None:
        try:
            proxy.set_upstreams(specs())
            logger.warning("upstreams read again: %d", len(specs()))
        except (OSError, BadUpstream) as error:
            logger.error("upstreams stay as they are: %s", error)

    # Answers are parsed into tens of thousands of objects without a cycle among them, which the collector
    # would look through again and again.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 50, 100)
    proxy = await Proxy.start(settings, specs(), host, port)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    print(f"agl-grpc proxy: {proxy.url}, {len(specs())} upstreams, store {settings.store}", flush=True)
    try:
        await ended.wait()
    finally:
        await proxy.stop()
