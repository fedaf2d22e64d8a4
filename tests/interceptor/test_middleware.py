"""Whose request it is, and what becomes of one that is nobody's; vLLM's place is taken by an echo."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from agl_grpc.interceptor.attempts import KnownAttempt
from agl_grpc.interceptor.attribution import CURRENT, Attribution, CallContext
from agl_grpc.interceptor.inside.middleware import AttributionMiddleware
from agl_grpc.interceptor.limits import RolloutLimits
from agl_grpc.interceptor.refusals import Refusal


class Interceptor:
    """What the middleware asks of the real one."""

    def __init__(self, unattributed: str = "serve") -> None:
        self.unattributed = unattributed
        self.full = False
        self.over: set[str] = set()
        self.known: KnownAttempt | None = None
        self.keep_raw = True
        self.limits = RolloutLimits()
        self.max_body = 1000
        self.errors: list[tuple[str, int, str]] = []
        self.refusals: list[tuple[int, str]] = []

    def accepting(self) -> bool:
        return not self.full

    async def admit(self, attribution: Attribution) -> KnownAttempt | None:
        if attribution.attempt_id in self.over:
            raise Refusal(409, "attempt_ended", "it is over")
        return self.known

    def describe(self) -> dict[str, Any]:
        return {"enabled": True}

    def refused(self, refusal: Refusal, context: CallContext | None) -> None:
        self.refusals.append((refusal.status, "" if context is None else context.attribution.attempt_id))

    def failed(self, context: CallContext, status: int, reason: str, raw: Any) -> asyncio.Future[None]:
        self.errors.append((context.api, status, reason))
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(durable.set_result, None)
        return durable

    async def stop(self) -> None:
        """Nothing to stop."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers whose request it took this for."""
    context = CURRENT.get()
    whose = None
    if context is not None:
        attribution = context.attribution
        whose = [attribution.rollout_id, attribution.attempt_id, attribution.agent_name, context.external]
    body = json.dumps({"path": scope["path"], "whose": whose}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def interceptor(monkeypatch: pytest.MonkeyPatch) -> Interceptor:
    made = Interceptor()
    monkeypatch.setattr(AttributionMiddleware, "interceptor", made)
    return made


async def post(path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(AttributionMiddleware(echo))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.post(path, headers=named, json={})


CHAT = "/v1/chat/completions"


async def test_url_key_and_headers_name_the_attempt(interceptor: Interceptor) -> None:
    by_url = await post(f"/rollout/r/attempt/a/agent/x{CHAT}")
    assert by_url.json() == {"path": CHAT, "whose": ["r", "a", "x", None]}
    by_headers = await post(CHAT, x_rollout_id="r", x_attempt_id="a", x_agl_agent="y")
    assert by_headers.json()["whose"] == ["r", "a", "y", None]
    claims = "WyJydW4iLCJyMiIsImEyIiwxXQ"  # ["run","r2","a2",1]
    by_key = await post(CHAT, authorization=f"Bearer agl1.{claims}.c2ln", x_rollout_id="r", x_attempt_id="a")
    assert by_key.json()["whose"] == ["r2", "a2", "", None]


@pytest.mark.parametrize("policy", ["serve", "record", "refuse"])
async def test_what_becomes_of_a_request_that_names_no_attempt(interceptor: Interceptor, policy: str) -> None:
    interceptor.unattributed = policy
    answer = await post(CHAT, x_agl_session="s")
    if policy == "refuse":
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unattributed")
        assert (await post("/v1/messages")).json()["error"]["type"] == "permission_error"
    elif policy == "record":
        assert answer.json()["whose"] == ["s", "external", "", "s"]
        lone = [(await post(CHAT)).json()["whose"] for _ in range(2)]
        assert lone[0][0] != lone[1][0]
        assert [whose[3] for whose in lone] == ["", ""]
    else:
        assert answer.json()["whose"] is None
    # What samples nothing is never in the way.
    assert (await post("/health")).json()["whose"] is None
    assert (await post("/v1/models")).json()["whose"] is None


async def test_refusals_have_the_shape_of_the_dialect(interceptor: Interceptor) -> None:
    interceptor.over.add("a")
    over = await post(f"/rollout/r/attempt/a{CHAT}")
    assert (over.status_code, over.json()["error"]["type"]) == (409, "conflict_error")
    assert over.headers["x-should-retry"] == "false"
    messages = await post("/rollout/r/attempt/a/v1/messages")
    assert (messages.status_code, messages.json()["type"]) == (409, "error")
    interceptor.full = True
    full = await post(f"/rollout/r/attempt/b{CHAT}")
    assert (full.status_code, full.headers["retry-after"]) == (503, "5")
    assert (await post(CHAT)).status_code == 200
    assert (await post("/rollout/r/attempt/b/collective_rpc")).status_code == 404
    assert (await post("/rollout/r/elsewhere")).status_code == 404
    # Each is told to the interceptor, with the attempt where it is one's call.
    assert interceptor.refusals == [(409, "a"), (409, "a"), (503, "b"), (404, ""), (404, "")]


async def strict(scope: Any, receive: Any, send: Any) -> None:
    """Reads its body, and answers what is no JSON as vLLM does: in one shape, whatever the dialect."""
    body, more = b"", True
    try:
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        json.loads(body)
        status, answer = 200, b"{}"
    except ValueError as error:
        status, answer = (
            400,
            json.dumps({"error": {"message": str(error), "type": "BadRequestError"}}).encode(),
        )
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": answer, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def ask(path: str, body: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(AttributionMiddleware(strict))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        return await client.post(f"/rollout/r/attempt/a{path}", content=body)


async def test_an_error_of_the_engine_gets_its_dialects_shape_and_a_record(interceptor: Interceptor) -> None:
    assert (await ask(CHAT, b"{}")).status_code == 200
    assert interceptor.errors == []
    chat = await ask(CHAT, b"{")
    assert (chat.status_code, chat.json()["error"]["type"]) == (400, "BadRequestError")
    messages = await ask("/v1/messages", b"{")
    reason = chat.json()["error"]["message"]
    assert messages.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": reason}}
    large = await ask("/v1/messages", b"[" + b" " * 1000 + b"]")
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    assert interceptor.errors == [
        ("chat.completions", 400, reason),
        ("messages", 400, reason),
        ("messages", 413, "the body has more than 1000 bytes"),
    ]
    # Not a call of an attempt's: as it comes.
    assert (await ask("/v1/messages/count_tokens", b"{")).json()["error"]["type"] == "BadRequestError"
    assert len(interceptor.errors) == 3


async def test_limits_of_a_rollout_inside_the_engine(interceptor: Interceptor) -> None:
    interceptor.limits = RolloutLimits(calls=3, tokens=10, concurrency=1)
    assert (await ask(CHAT, b"{}")).status_code == 200
    interceptor.limits.enter("r")
    busy = await ask("/v1/messages", b"{}")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert busy.json()["error"]["type"] == "rate_limit_error"
    interceptor.limits.leave("r")
    interceptor.limits.spend("r", 10)
    spent = await ask(CHAT, b"{}")
    assert (spent.status_code, spent.json()["error"]["code"]) == (429, "rollout_limit")
    assert "10 tokens of 10" in spent.json()["error"]["message"]
    assert interceptor.refusals == [(429, "a"), (429, "a")]
    assert (await post("/v1/models")).status_code == 200
