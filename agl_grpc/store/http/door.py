"""The HTTP door: binds, serves with uvicorn on the store's own event loop, drains."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any

from agl_grpc.store.door.server import StartError, listening_sockets

if TYPE_CHECKING:
    from agl_grpc.store.http.server import HttpServer


class HttpDoor:
    """One or more ports that serve an ASGI application.

    Args:
        app: The application.
        grace: Seconds that requests under way may take while draining.
        tls: How to speak TLS; None = without.
    """

    def __init__(self, app: Any, grace: float, tls: ssl.SSLContext | None = None) -> None:
        self._app = app
        self._grace = grace
        self._tls = tls
        self._server: HttpServer | None = None
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
        # Uvicorn takes its time to be imported, which a store without this door need not wait for.
        from agl_grpc.store.http.server import HttpServer

        server = self._server = HttpServer.of(self._app, self._grace, self._tls)
        self._task = asyncio.get_running_loop().create_task(server.serve(self._sockets))
        while not server.started:
            if self._task.done():
                self._task.result()
                raise StartError("the HTTP door did not start")
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Takes no new requests, lets those under way end, closes the ports."""
        if self._task is None or self._server is None:
            for one in self._sockets:
                one.close()
            return
        self._server.should_exit = True
        await self._task
        self._task = None
