"""An engine that answers after a fixed time with what was encoded beforehand: it costs next to nothing.

Its answers carry token ids and logprobs where the request asks for them, as vLLM's do. The path says how
large they are and how long they take: `/P/T/MS` for P prompt tokens, T answer tokens and MS milliseconds.
Prompts differ from each other from the first token on, unless the path says `same`. A stream has one event a
token: the first after MS milliseconds, each next one after EVERY of `/P/T/MS/EVERY`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import sys
from collections.abc import Callable
from typing import cast

import orjson
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

_variants = itertools.cycle(range(7))


@functools.cache
def tokens(count: int) -> list[int]:
    """Made-up token ids."""
    return [random.Random(number).randrange(1000, 150_000) for number in range(count)]


@functools.cache
def whole_answer(prompt: int, answer: int, ids: bool, variant: int = 0) -> bytes:
    """Head and body of an answer; the first token of its prompt tells the variants apart."""
    table = [
        {"token": " word", "logprob": -0.1234567 - number / 1e4, "bytes": [32, 119, 111], "top_logprobs": []}
        for number in range(answer)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " word" * answer, "tool_calls": []},
        "logprobs": {"content": table} if ids else None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": tokens(answer) if ids else None,
    }
    body = orjson.dumps(
        {
            "id": "chatcmpl-0123456789abcdef",
            "object": "chat.completion",
            "created": 1,
            "model": "tiny",
            "choices": [choice],
            "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
            "prompt_token_ids": [1000 + variant, *tokens(prompt)[1:]] if ids else None,
        }
    )
    return _HEAD % len(body) + body


@functools.cache
def stream_event(prompt: int, number: int, last: bool, ids: bool) -> bytes:
    """One event as a chunk of the body."""
    choice: dict[str, object] = {"index": 0, "delta": {"content": " word"}, "logprobs": None}
    choice["finish_reason"] = "length" if last else None
    choice["token_ids"] = [tokens(number + 1)[number]] if ids else None
    if ids:
        entry = {"token": " word", "logprob": -0.1234567, "bytes": [32, 119, 111], "top_logprobs": []}
        choice["logprobs"] = {"content": [entry]}
    event: dict[str, object] = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk"}
    event |= {"created": 1, "model": "tiny", "choices": [choice]}
    if number == 0:
        event["prompt_token_ids"] = tokens(prompt) if ids else None
    data = b"data: " + orjson.dumps(event) + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
    return b"%x\r\n%s\r\n" % (len(data), data)


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            found = head.find(b"content-length:")
            stop = head.find(b"\r\n", found)
            length = int(head[found + 15 : stop if stop >= 0 else len(head)]) if found >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body = bytes(self._data[end + 4 : end + 4 + length])
            del self._data[: end + 4 + length]
            self._answer(head.split(b" ", 2)[1].decode(), body)

    def _answer(self, path: str, body: bytes) -> None:
        numbers = [int(part) for part in path.split("/") if part.isdigit()]
        if len(numbers) < 3:
            self._transport.write(_HEALTHY)
            return
        prompt, answer, wait, *every = numbers
        ids = b'"return_token_ids":true' in body
        if b'"stream":true' in body:
            pause = (every or [0])[0] / 1000
            self._loop.call_later(wait / 1000, self._stream, prompt, answer, pause, ids, 0)
        else:
            variant = 0 if "/same" in path else next(_variants)
            self._later(wait / 1000, whole_answer(prompt, answer, ids, variant))

    def _later(self, seconds: float, data: bytes) -> None:
        self._loop.call_later(seconds, self._write, data)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _stream(self, prompt: int, answer: int, pause: float, ids: bool, number: int) -> None:
        if number == 0:
            self._write(_STREAM_HEAD)
        last = number + 1 == answer
        self._write(stream_event(prompt, number, last, ids))
        if last:
            self._write(b"0\r\n\r\n")
        else:
            again: Callable[..., None] = self._stream
            self._loop.call_later(pause, again, prompt, answer, pause, ids, number + 1)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    sys.exit(uvloop.run(_serve()))
