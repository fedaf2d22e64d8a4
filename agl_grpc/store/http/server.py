"""Uvicorn within a process that has an event loop, and signals, of its own."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agl_grpc.store.http.problems import HttpProblem, problem_of

_KEEP_ALIVE_SECONDS = 75
_LONGEST_URL = 65_535
"""Bytes; the parser knows no longer ones."""


class HttpProtocol(HttpToolsProtocol):
    """Refuses what is no HTTP request as every other request is refused."""

    def send_400_response(self, msg: str) -> None:
        """Answers and closes the connection, of which nobody knows where the next request begins."""
        detail = "this is no HTTP request that can be read"
        # Not set before the first request begins.
        if (length := len(getattr(self, "url", b""))) > _LONGEST_URL:
            detail = f"the URL has {length} bytes; at most {_LONGEST_URL} are allowed"
        problem = problem_of(HttpProblem(400, "INVALID_REQUEST", detail))
        body = orjson.dumps(problem.body)
        head = (
            f"HTTP/1.1 {problem.status} Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Signals are the process's own business, not the server's."""

    @classmethod
    def of(cls, app: Any, grace: float, tls: ssl.SSLContext | None = None) -> HttpServer:
        """A server of an ASGI application; requests under way get so many seconds at the end."""
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
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
