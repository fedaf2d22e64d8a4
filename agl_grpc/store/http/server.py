"""Uvicorn within a process that has an event loop, and signals, of its own."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

_KEEP_ALIVE_SECONDS = 75


class HttpServer(uvicorn.Server):
    """Signals are the process's own business, not the server's."""

    @classmethod
    def of(cls, app: Any, grace: float, tls: ssl.SSLContext | None = None) -> HttpServer:
        """A server of an ASGI application; requests under way get so many seconds at the end."""
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
        config.load()
        # The context is made for all doors at once: with it a bad file is known before any port is open.
        config.ssl = tls
        return cls(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signal handlers alone."""
        yield
