"""The HTTP door: binds, serves with uvicorn on the store's own event loop, drains."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from agl_grpc.store.door.server import StartError, listening_sockets

_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """Signals are the process's own business, not the door's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signal handlers alone."""
        yield


class HttpDoor:
    """One or more ports that serve an ASGI application.

    Args:
        app: The application.
        grace: Seconds that requests under way may take while draining.
    """

    def __init__(self, app: Any, grace: float) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="warning",
            date_header=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(grace)),
            backlog=1024,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._sockets: list[socket.socket] = []

    def bind(self, host: str, port: int, option: str = "--http-port") -> int:
        """Binds one more port; call it before `start`.

        Args:
            host: Address to bind to.
            port: Port, 0 = any free one.
            option: The command's option that chooses it, for the message.

        Returns:
            The port.

        Raises:
            StartError: The port cannot be bound.
        """
        sockets = listening_sockets(host, port, option)
        self._sockets += sockets
        return int(sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Serves; returns when requests are answered."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(self._sockets))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise StartError("the HTTP door did not start")
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Takes no new requests, lets those under way end, closes the ports."""
        if self._task is None:
            for one in self._sockets:
                one.close()
            return
        self._server.should_exit = True
        await self._task
        self._task = None
