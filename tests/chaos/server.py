"""A store server that starts in a moment, so that it can be killed a thousand times.

The processes are forked from one that has imported everything; each is a whole server with its own life.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from agl_grpc.store.door.app import ServeConfig
from agl_grpc.store.serve import serve
from agl_grpc.store.storage import failpoints
from tests.support.store_process import wait_until_serving
from tests.support.waiting import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_START_SECONDS = 30.0


class KillableStore:
    """One store that is stopped, killed and started again on its database and port.

    Args:
        database: The SQLite file, or a database's URL.
        log: Where its output goes.
    """

    def __init__(self, database: Path | str, log: Path) -> None:
        _CONTEXT.set_forkserver_preload(["agl_grpc.store.serve", "tests.chaos.server"])
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._database = database
        self._log = log
        self._process: ForkServerProcess | None = None
        self.starts = 0

    async def start(self, faults: str = "", limit_pages: int = 0) -> None:
        """Starts the server and returns when it serves; at once when faults may end it before.

        Args:
            faults: Value of AGL_GRPC_FAILPOINTS.
            limit_pages: Size at which its disk is full, in pages of 8 KiB; 0 = the disk's.
        """
        config = ServeConfig(
            port=self.port, database=self._database, grace=1.0, log_level="WARNING", limit_pages=limit_pages
        )
        self._process = _CONTEXT.Process(target=_run, args=(config, faults, str(self._log)), daemon=True)
        self._log.touch()
        self._process.start()
        self.starts += 1
        if not faults:
            await asyncio.to_thread(wait_until_serving, self.address, self._log, _START_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    async def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        await self.ended()

    async def ended(self, within: float = 30.0) -> int | None:
        """Waits for the process to end; returns its exit code, None = it still runs."""
        assert self._process is not None
        await asyncio.to_thread(self._process.join, within)
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        assert self._process is not None
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _run(config: ServeConfig, faults: str, log: str) -> None:
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ[failpoints.VARIABLE] = faults
    sys.exit(serve(config))
