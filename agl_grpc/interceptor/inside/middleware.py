"""Pure ASGI middleware: whose call it is, a closed door to everything else, and the last byte held."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

from agl_grpc.interceptor.attempts import KnownAttempt
from agl_grpc.interceptor.attribution import (
    CURRENT,
    NOT_SAMPLING,
    STATUS_PATH,
    Attribution,
    CallContext,
    api_of,
    attribution_of_credential,
    attribution_of_headers,
    credential_of,
    names_mode,
    parse_path,
    parse_traceparent,
)
from agl_grpc.interceptor.capture.retries import tries_of
from agl_grpc.interceptor.external import EXTERNAL
from agl_grpc.interceptor.inside.held import HeldAnswer, Message, Receive, Send
from agl_grpc.interceptor.limits import RolloutLimits
from agl_grpc.interceptor.refusals import RETRY_AFTER_SECONDS, Refusal
from agl_grpc.v1 import common_pb2

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_CLOSED = "no such path here: under an attempt's base URL only inference paths exist"
_FULL = "the capture spool is full because the store has been away for too long: try later"
_UNATTRIBUTED = (
    "calls that name no attempt are refused here: use the attempt's base URL, its credential as API key, or "
    "the headers x-rollout-id and x-attempt-id"
)


class Running(Protocol):
    """What the middleware asks of the interceptor."""

    def accepting(self) -> bool:
        """False when new attributed calls cannot be made durable: the spool is full."""
        ...

    @property
    def unattributed(self) -> str:
        """What becomes of calls that name no attempt: ``serve``, ``record`` or ``refuse``."""
        ...

    @property
    def keep_raw(self) -> bool:
        """Whether requests and answers are kept as they came and went."""
        ...

    @property
    def limits(self) -> RolloutLimits:
        """What each rollout may use."""
        ...

    @property
    def max_body(self) -> int:
        """Most bytes of a request of an attempt; 0: no limit."""
        ...

    def refused(self, refusal: Refusal, context: CallContext | None) -> None:
        """Count a refusal; `context` is set for a call of an attempt, which may get a record of it."""
        ...

    def failed(
        self, context: CallContext, status: int, reason: str, raw: common_pb2.Payload | None
    ) -> asyncio.Future[None]:
        """Record a request that ended as an error before it reached the engine."""
        ...

    async def admit(self, attribution: Attribution) -> KnownAttempt | None:
        """The attempt as far as it is known.

        Raises Refusal for one that is over, unknown, or not the credential's, and while no calls are taken.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Counters for people."""
        ...

    async def stop(self) -> None:
        """Deliver or spool what was captured: the server ends."""
        ...


class AttributionMiddleware:
    """vLLM's ``--middleware``: rewrites ``/rollout/ID/attempt/ID/v1/…`` to ``/v1/…``, noting whose it is.

    An attempt credential as API key and the headers ``x-rollout-id`` and ``x-attempt-id`` attribute plain
    ``/v1/…`` paths. Other requests pass untouched, unless they are to be recorded or refused. The end of an
    attributed answer waits until its calls are durable. ``GET /agl/interceptor`` answers what
    was captured and where it is; the interceptor is stopped with the server.
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
            state = {"enabled": False} if self.interceptor is None else self.interceptor.describe()
            await _answer(send, 200, json.dumps(state).encode())
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # The raw path: in the decoded one a slash inside an id cannot be told from a separator.
        raw_path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        parsed = _attributed(raw_path, headers)
        api = api_of(raw_path if parsed is None else parsed[1])
        context: CallContext | None = None
        counted = scope.get("method") == "POST"
        try:
            if parsed is None:
                await self._pass(scope, receive, send, headers, api)
                return
            if scope["type"] != "http" or api is None:
                raise Refusal(404, "no_such_path", _CLOSED)
            attribution, path = parsed
            counted = counted and path not in NOT_SAMPLING
            context = CallContext(attribution, api, *parse_traceparent(headers.get("traceparent", "")))
            context.known = known = await self._admit(attribution)
            mode = "" if known is None else known.mode
            if mode not in ("", attribution.mode) and not (names_mode(raw_path) or "x-agl-mode" in headers):
                context.attribution = dataclasses.replace(attribution, mode=mode)
            await self._let_in(self._rewrite(scope, path), receive, send, context, headers, counted)
        except Refusal as refusal:
            if self.interceptor is not None:
                self.interceptor.refused(refusal, context if counted else None)
            await _refuse(send, scope["type"], refusal, api or "")

    async def _let_in(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        context: CallContext,
        headers: Mapping[str, str],
        counted: bool,
    ) -> None:
        """Serve a request of an attempt; `counted` says whether it is a call, which limits concern."""
        running = self.interceptor if counted else None
        if running is None:
            await self._serve(scope, receive, send, context, headers)
            return
        rollout = context.attribution.rollout_id
        running.limits.enter(rollout)
        try:
            await self._serve(scope, receive, send, context, headers, running)
        finally:
            running.limits.leave(rollout)

    async def _admit(self, attribution: Attribution) -> KnownAttempt | None:
        if self.interceptor is None:
            return None
        if not self.interceptor.accepting():
            raise Refusal(503, "spool_full", _FULL, retry_after=RETRY_AFTER_SECONDS, recorded=False)
        return await self.interceptor.admit(attribution)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], api: str | None
    ) -> None:
        """A request without attribution: as the operator wants it."""
        if scope["path"].startswith("/rollout/"):
            raise Refusal(404, "no_such_path", _CLOSED)
        policy = (
            "serve" if self.interceptor is None or api in (None, "models") else self.interceptor.unattributed
        )
        if policy == "refuse":
            raise Refusal(403, "unattributed", _UNATTRIBUTED)
        if policy == "serve" or api is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        session = headers.get("x-agl-session", "")
        attribution = dataclasses.replace(EXTERNAL, rollout_id=session or uuid.uuid4().hex)
        traceparent = parse_traceparent(headers.get("traceparent", ""))
        context = CallContext(attribution, api, *traceparent, external=session)
        await self._serve(scope, receive, send, context, headers)

    def _stopping_first(self, receive: Receive) -> Receive:
        """The interceptor ends before the application: vLLM's own end takes the engine's state away."""

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self.interceptor is not None:
                await self.interceptor.stop()
            return message

        return received

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        context: CallContext,
        headers: Mapping[str, str],
        attempts: Running | None = None,
    ) -> None:
        """`attempts` is set for what counts as a call of an attempt."""
        answer = context.answer = HeldAnswer(
            receive,
            send,
            path=scope["path"],
            tries=tries_of(headers),
            keep_raw=self.interceptor is not None and self.interceptor.keep_raw,
            api=context.api,
            max_body=0 if attempts is None else attempts.max_body,
            spend=partial(attempts.limits.spend, context.attribution.rollout_id) if attempts else None,
            failed=partial(attempts.failed, context) if attempts else None,
        )
        token = CURRENT.set(context)
        try:
            await self._app(scope, answer.receive, answer.send)
        finally:
            CURRENT.reset(token)
            answer.close()

    def _rewrite(self, scope: Scope, path: str) -> Scope:
        rewritten = dict(scope)
        rewritten["path"] = unquote(path)
        rewritten["raw_path"] = path.encode("latin-1")
        if self.engine_key is not None:
            kept = [(k, v) for k, v in scope["headers"] if k not in (b"authorization", b"x-api-key")]
            rewritten["headers"] = [*kept, (b"authorization", b"Bearer " + self.engine_key.encode())]
        return rewritten


def _attributed(path: str, headers: dict[str, str]) -> tuple[Attribution, str] | None:
    """Whose request it is, by URL, else by API key, else by headers; and the engine's own path."""
    credential = credential_of(headers)
    parsed = parse_path(path)
    if parsed is not None:
        return dataclasses.replace(parsed[0], credential=credential) if credential else parsed[0], parsed[1]
    if path.startswith("/rollout/"):
        return None
    whose = attribution_of_credential(credential) or attribution_of_headers(headers)
    return None if whose is None else (whose, path)


async def _refuse(send: Send, kind: str, refusal: Refusal, api: str) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        return
    await _answer(send, refusal.status, refusal.body(api), refusal.headers())


async def _answer(send: Send, status: int, body: bytes, more: Mapping[str, str] | None = None) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
