"""An OpenAI-compatible endpoint whose answers a test writes: for exactness and for faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Script = Callable[[str, str], str | int]
"""Model and user message to an answer, or to a status code for a refusal."""


class ScriptedModel:
    """Serves ``/v1/chat/completions`` on a random port of the loopback interface; a context manager.

    ``calls`` are the model and the user message of every call, in their order. ``token_ids``, of the prompt
    and of the answer, are put into each answer where vLLM puts them when it is asked for them.
    """

    def __init__(self, script: Script, token_ids: tuple[list[int], list[int]] | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = body["messages"][-1]["content"]
                with outer._lock:
                    outer.calls.append((body["model"], message))
                answer = script(body["model"], message)
                status = answer if isinstance(answer, int) else 200
                data = json.dumps(
                    _refusal(status) if status != 200 else _completion(body, str(answer), token_ids)
                )
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data.encode())))
                self.end_headers()
                self.wfile.write(data.encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _completion(
    body: dict[str, Any], text: str, token_ids: tuple[list[int], list[int]] | None
) -> dict[str, Any]:
    words = sum(len(message["content"].split()) for message in body["messages"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    ids: dict[str, Any] = {}
    if token_ids is not None:
        ids, choice["token_ids"] = {"prompt_token_ids": token_ids[0]}, token_ids[1]
    return {
        **ids,
        "id": "scripted",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {
            "prompt_tokens": words,
            "completion_tokens": len(text.split()),
            "total_tokens": words + len(text.split()),
        },
    }


def _refusal(status: int) -> dict[str, Any]:
    return {"error": {"message": f"scripted refusal {status}", "type": "scripted", "code": None}}
