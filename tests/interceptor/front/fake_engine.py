"""An engine for timing and faults: answers as vLLM does, with made-up tokens, or as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Script = Callable[[web.BaseRequest, dict[str, Any]], Awaitable[web.StreamResponse]]

PROMPT = [1, 2, 3, 4]
TOKENS = [11, 12, 13]
LOGPROBS = [-0.5, -0.25, -1.5]
WORDS = ["one ", "two ", "three"]


class FakeEngine:
    """Use `fake_engine`. `script` takes over POST requests; `requests` are the bodies that came."""

    def __init__(self) -> None:
        self.url = ""
        self.script: Script | None = None
        self.healthy = True
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cut = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        if request.path == "/version":
            return web.json_response({"version": "0.0.1"})
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        try:
            if self.script is not None:
                return await self.script(request, body)
            await self.gate.wait()
            if "chat" not in request.path and "/completions" not in request.path:
                return web.json_response({"id": "other-1", "path": request.path, "x": [1.0, 2]})
            return await (self.stream(request, body) if body.get("stream") else self.whole(request, body))
        except (asyncio.CancelledError, ConnectionError):
            self.cut.set()
            raise

    async def whole(self, request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(answer_of(request.path, body))

    async def stream(self, request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for event in events_of(request.path, body):
            await response.write(event)
            await self.gate.wait()
        await response.write_eof()
        return response


def answer_of(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer; without what only we ask for it is what clients of the bare engine get."""
    chat = "chat" in path
    ids = body.get("return_token_ids") is True
    prompts = body.get("prompt") if not chat else None
    count = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], str | list) else 1
    choices = []
    for index in range((body.get("n") or 1) * count):
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "stop_reason": None}
        tokens = [token + 100 * index for token in TOKENS]
        if chat:
            choice["message"] = {"role": "assistant", "content": "".join(WORDS)}
            choice["logprobs"] = {"content": chat_logprobs()} if body.get("logprobs") else None
        else:
            choice["text"] = "".join(WORDS)
            wanted = body.get("logprobs") is not None
            choice["logprobs"] = {"token_logprobs": LOGPROBS, "tokens": WORDS} if wanted else None
            choice["prompt_token_ids"] = PROMPT if ids else None
        choice["token_ids"] = tokens if ids else None
        choices.append(choice)
    made = {"id": "answer-1", "model": body.get("model"), "choices": choices, "usage": {"total_tokens": 7}}
    if chat:
        made["prompt_token_ids"] = PROMPT if ids else None
    return made


def chat_logprobs(start: int = 0, end: int = len(TOKENS)) -> list[dict[str, Any]]:
    return [
        {"token": WORDS[i], "logprob": LOGPROBS[i], "bytes": None, "top_logprobs": []}
        for i in range(start, end)
    ]


def events_of(path: str, body: dict[str, Any]) -> list[bytes]:
    """A stream's events; one of them is there for the ids alone, as when a parser holds text back."""
    chat = "chat" in path
    ids = body.get("return_token_ids") is True
    logprobs = bool(body.get("logprobs")) if chat else body.get("logprobs") is not None
    found: list[dict[str, Any]] = []
    base = {"id": "answer-1", "object": "chunk", "model": body.get("model")}
    if chat:
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        found.append({**base, "choices": [first], "prompt_token_ids": PROMPT if ids else None})
    for number, word in enumerate(WORDS):
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if number == len(WORDS) - 1 else None}
        choice["token_ids"] = [TOKENS[number]] if ids else None
        if chat:
            # The second word is held back and comes with the third.
            text = {0: WORDS[0], 2: WORDS[1] + WORDS[2]}.get(number)
            choice["delta"] = {} if text is None else {"content": text}
            choice["logprobs"] = {"content": chat_logprobs(number, number + 1)} if logprobs else None
            if text is None and not ids and not logprobs:
                continue
        else:
            choice["text"] = word
            choice["logprobs"] = {"token_logprobs": [LOGPROBS[number]]} if logprobs else None
            choice["prompt_token_ids"] = PROMPT if ids and number == 0 else None
        found.append({**base, "choices": [choice]})
    if (body.get("stream_options") or {}).get("include_usage"):
        found.append({**base, "choices": [], "usage": {"total_tokens": 7}})
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in found] + [b"data: [DONE]\n\n"]


@asynccontextmanager
async def fake_engine() -> AsyncIterator[FakeEngine]:
    """A running engine on a random port."""
    engine = FakeEngine()
    door = web.Server(engine.handle, handler_cancellation=True)
    server = await asyncio.get_running_loop().create_server(door, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        await door.shutdown(0.1)
