"""Pure ASGI middleware: attribution from the URL, a closed door to everything else, and the last byte held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from agl_grpc.interceptor.attribution import CURRENT, Attribution, CallContext, api_of, parse_path, parse_traceparent

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_SECONDS = 5


class Gate(Protocol):
    """What the middleware asks of the interceptor: whether new attributed calls can be made durable."""

    def accepting(self) -> bool:
        """False when the spool is full."""
        ...


class AttributionMiddleware:
    """vLLM's ``--middleware``: rewrites ``/rollout/ID/attempt/ID/v1/…`` to ``/v1/…`` and remembers whose it was.

    Requests without attribution pass untouched. Under ``/rollout`` only inference paths exist. The final body
    message of an attributed answer waits until its calls are durable.
    """

    gate: Gate | None = None
    """Set by the endpoint plugin when capture is on."""

    engine_key: str | None = None
    """vLLM's own API key, put in the place of the agent's; None when vLLM asks for none."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if not scope.get("path", "").startswith("/rollout/"):
            await self._app(scope, receive, send)
            return
        parsed = parse_path(scope["path"])
        api = api_of(parsed[1]) if parsed is not None else None
        if scope["type"] != "http" or parsed is None or api is None:
            await _refuse(send, scope["type"], 404, "no such path under /rollout: only inference paths exist here")
            return
        if self.gate is not None and not self.gate.accepting():
            await _refuse(send, "http", 503, "capture spool full: the store has been away for too long; try later")
            return
        context = self._context(scope, parsed[0], api)
        token = CURRENT.set(context)
        try:
            await self._app(self._rewrite(scope, parsed[1]), receive, _holding_last_byte(send, context))
        finally:
            CURRENT.reset(token)

    @staticmethod
    def _context(scope: Scope, attribution: Attribution, api: str) -> CallContext:
        headers = dict(scope["headers"])
        trace_id, parent = parse_traceparent(headers.get(b"traceparent", b"").decode("latin-1"))
        bearer = headers.get(b"authorization", b"").decode("latin-1")
        credential = bearer[7:] if bearer[:7].lower() == "bearer " else headers.get(b"x-api-key", b"").decode("latin-1")
        whose = Attribution(
            attribution.rollout_id,
            attribution.attempt_id,
            attribution.agent_name,
            attribution.mode,
            attribution.notrain,
            credential,
        )
        return CallContext(whose, api, trace_id, parent)

    def _rewrite(self, scope: Scope, path: str) -> Scope:
        rewritten = dict(scope)
        rewritten["path"] = path
        rewritten["raw_path"] = path.encode()
        if self.engine_key is not None:
            kept = [(k, v) for k, v in scope["headers"] if k not in (b"authorization", b"x-api-key")]
            rewritten["headers"] = [*kept, (b"authorization", b"Bearer " + self.engine_key.encode())]
        return rewritten


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
    body = json.dumps({"error": {"message": reason, "type": "agl_grpc", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
