"""The ASGI application of the HTTP port: finds the route, answers, turns errors into JSON."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import orjson

from agl_grpc.store import errors
from agl_grpc.store.errors import StoreError
from agl_grpc.store.http.problems import HttpProblem, problem_of
from agl_grpc.store.http.request import ClientGone, Receive, Request, Scope
from agl_grpc.store.http.routing import Answer, Handler, Router

log = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Routes = Mapping[tuple[str, str], Handler]
"""Handlers by method and path."""

_ALLOWED_HEADERS = b"authorization, content-type, content-encoding, idempotency-key"


class HttpApp:
    """Serves routes.

    Args:
        routes: Tables of routes.
        cors_origins: Origins of web pages that may call; `*` = all. Empty = only pages of this very port.
    """

    def __init__(self, routes: Iterable[Routes], cors_origins: Sequence[str] = ()) -> None:
        self._router = Router()
        for table in routes:
            for (method, path), handler in table.items():
                self._router.add(method, path, handler)
        self._origins = frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            answer = await self._answer(request, scope)
        except ClientGone:
            return
        headers = [(b"content-type", answer.media_type), *answer.headers]
        if self._origins:
            headers += self._cors(request)
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if not isinstance(answer.body, bytes):
            await _send_pieces(request, answer.body, start, send)
            return
        headers.append((b"content-length", str(len(answer.body)).encode()))
        await send(start)
        body = b"" if request.method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, request: Request, scope: Scope) -> Answer:
        raw_path = scope.get("raw_path") or request.path.encode()
        method = "GET" if request.method == "HEAD" else request.method
        found = self._router.find(method, raw_path.decode("latin-1"))
        request.names = found.names
        try:
            self._check_origin(request)
            if found.handler is not None:
                return await found.handler(request)
            if method == "OPTIONS" and self._origins and found.allowed:
                return Answer(status=204)
            raise self._unserved(request, found.allowed)
        except (HttpProblem, StoreError) as error:
            return refusal(error)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return refusal(errors.internal())

    def _unserved(self, request: Request, methods: Collection[str]) -> HttpProblem:
        if methods:
            allowed = ", ".join(sorted(methods))
            return HttpProblem(
                405,
                "METHOD_NOT_ALLOWED",
                f"{request.method} is not served at {request.path}; allowed: {allowed}",
                headers=((b"allow", allowed.encode()),),
            )
        return HttpProblem(404, "ROUTE_UNKNOWN", self._hint(request.path))

    def _hint(self, path: str) -> str:
        first, _, rest = path.lstrip("/").partition("/")
        second = rest.partition("/")[0]
        version = second if first == "agl" else first if second == "agl" else ""
        document = "/agl/v1/openapi.json"
        if self._router.find("GET", document).handler is None:
            return f"nothing is served at {path}"
        if version and version != "v1":
            return f"API version {version!r} is not served; use /agl/v1 or /v1/agl"
        return f"nothing is served at {path}; {document} lists what is"

    def _check_origin(self, request: Request) -> None:
        """Refuses what somebody else's web page has a browser send; browsers say so, programs never do."""
        foreign = request.header(b"sec-fetch-site") == "cross-site"
        if foreign and "*" not in self._origins and request.header(b"origin") not in self._origins:
            raise HttpProblem(
                403, "NOT_PERMITTED", "pages of other sites may not call; allow theirs with --cors-origin"
            )

    def _cors(self, request: Request) -> list[tuple[bytes, bytes]]:
        origin = request.header(b"origin")
        if "*" not in self._origins and origin not in self._origins:
            return [(b"vary", b"origin")]
        return [
            (b"access-control-allow-origin", origin.encode("latin-1") or b"*"),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", _ALLOWED_HEADERS),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]


async def _send_pieces(
    request: Request, pieces: AsyncGenerator[bytes, None], start: MutableMapping[str, Any], send: Send
) -> None:
    """Sends a body while it is made. What fails then breaks the connection: the status is already out."""
    await send(start)
    gone = asyncio.ensure_future(request.gone())
    try:
        if request.method != "HEAD":
            async for piece in pieces:
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        gone.cancel()
        await pieces.aclose()


def refusal(error: HttpProblem | StoreError) -> Answer:
    """An error as JSON."""
    problem = problem_of(error)
    return Answer(orjson.dumps(problem.body), problem.status, headers=tuple(problem.headers))
