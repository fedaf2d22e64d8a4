"""Runs a store server as a process: event loop, signals, exit codes."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys

from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.door.server import StartError
from agl_grpc.store.logs import setup_logging

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0001
_GC_THRESHOLD = 20_000


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The process's exit code: 0 after a graceful drain, 1 when the server could not start (one line on
        standard error says why and what to do).
    """
    setup_logging(config.log_level)
    # The writer's thread gives the interpreter lock away at each call of SQLite and would wait for a whole
    # switch interval, 5 ms by default, to get it back from a busy event loop.
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config))


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.Loop


async def _serve(config: ServeConfig) -> int:
    try:
        server = await StoreServer.start(config)
    except StartError as error:
        print(f"agl-grpc store: {error}", file=sys.stderr, flush=True)
        return 1
    stop = _stop_signal()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 50)
    log.info(server.describe())
    name = await stop
    log.info("%s: draining; calls under way have %g s", name, config.grace)
    await server.stop()
    log.info("Stopped; everything acknowledged is stored")
    return 0


def _stop_signal() -> asyncio.Future[str]:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()

    def told(name: str) -> None:
        if not stop.done():
            stop.set_result(name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told, number.name)
    return stop
