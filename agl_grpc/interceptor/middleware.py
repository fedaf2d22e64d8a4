"""Pure ASGI middleware: whose call it is, a closed door to everything else, and the last byte held."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from agl_grpc.interceptor.attribution import (
    CURRENT,
    Attribution,
    CallContext,
    api_of,
    attribution_of_credential,
    parse_path,
    parse_traceparent,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_SECONDS = 5
STATUS_PATH = "/agl/interceptor"
_CLOSED = "no such path here: under an attempt's base URL only inference paths exist"
_FULL = "the capture spool is full because the store has been away for too long: try later"


class Running(Protocol):
    """What the middleware asks of the interceptor."""

    def accepting(self) -> bool:
        """False when new attributed calls cannot be made durable: the spool is full."""
        ...

    def describe(self) -> dict[str, Any]:
        """Counters for people."""
        ...

    async def stop(self) -> None:
        """Deliver or spool what was captured: the server ends."""
        ...


class AttributionMiddleware:
    """vLLM's ``--middleware``: rewrites ``/rollout/ID/attempt/ID/v1/…`` to ``/v1/…``, noting whose it is.

    An attempt credential as API key attributes plain ``/v1/…`` paths. Other requests pass untouched. The
    final body message of an attributed answer waits until its calls are durable. ``GET /agl/interceptor``
    answers what was captured and where it is; the interceptor is stopped with the server.
    """

    interceptor: Running | None = None
    """Set when capture is on."""

    engine_key: str | None = None
    """vLLM's own API key, put in the place of the agent's; None when vLLM asks for none."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, self._stopping_first(receive), send)
            return
        if scope["path"] == STATUS_PATH:
            await _answer(
                send, 200, {"enabled": False} if self.interceptor is None else self.interceptor.describe()
            )
            return
        credential = _credential(dict(scope["headers"]))
        # The raw path: in the decoded one a slash inside an id cannot be told from a separator.
        raw_path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        parsed = _attributed(raw_path, credential)
        if parsed is None:
            if scope["path"].startswith("/rollout/"):
                await _refuse(send, scope["type"], 404, _CLOSED)
            else:
                await self._app(scope, receive, send)
            return
        attribution, path = parsed
        api = api_of(path)
        if scope["type"] != "http" or api is None:
            await _refuse(send, scope["type"], 404, _CLOSED)
        elif self.interceptor is not None and not self.interceptor.accepting():
            await _refuse(send, "http", 503, _FULL)
        else:
            await self._serve(scope, receive, send, attribution, path, api)

    def _stopping_first(self, receive: Receive) -> Receive:
        """The interceptor ends before the application: vLLM's own end takes the engine's state away."""

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self.interceptor is not None:
                await self.interceptor.stop()
            return message

        return received

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, attribution: Attribution, path: str, api: str
    ) -> None:
        traceparent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        context = CallContext(attribution, api, *parse_traceparent(traceparent))
        token = CURRENT.set(context)
        try:
            await self._app(self._rewrite(scope, path), receive, _holding_last_byte(send, context))
        finally:
            CURRENT.reset(token)

    def _rewrite(self, scope: Scope, path: str) -> Scope:
        rewritten = dict(scope)
        rewritten["path"] = unquote(path)
        rewritten["raw_path"] = path.encode("latin-1")
        if self.engine_key is not None:
            kept = [(k, v) for k, v in scope["headers"] if k not in (b"authorization", b"x-api-key")]
            rewritten["headers"] = [*kept, (b"authorization", b"Bearer " + self.engine_key.encode())]
        return rewritten


def _attributed(path: str, credential: str) -> tuple[Attribution, str] | None:
    parsed = parse_path(path)
    if parsed is not None:
        return dataclasses.replace(parsed[0], credential=credential), parsed[1]
    whose = None if path.startswith("/rollout/") else attribution_of_credential(credential)
    return None if whose is None else (whose, path)


def _credential(headers: dict[bytes, bytes]) -> str:
    bearer = headers.get(b"authorization", b"").decode("latin-1")
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


def _holding_last_byte(send: Send, context: CallContext) -> Send:
    async def held(message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and context.durable:
            await asyncio.wait(context.durable)
        await send(message)

    return held


async def _refuse(send: Send, kind: str, status: int, reason: str) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    body = {"error": {"message": reason, "type": "agl_grpc", "code": status}}
    retry = [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if status == 503 else []
    await _answer(send, status, body, retry)


async def _answer(
    send: Send, status: int, content: dict[str, Any], more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
