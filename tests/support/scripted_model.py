"""An OpenAI-compatible endpoint whose answers a test writes: for exactness and for faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.scripted_server import ScriptedServer

Script = Callable[[str, str], str | int]
"""Model and user message to an answer, or to a status code for a refusal."""


class ScriptedModel(ScriptedServer):
    """Serves ``/v1/chat/completions`` on a random port of the loopback interface; a context manager.

    ``calls`` are the model and the user message of every call, in their order. ``token_ids``, of the prompt
    and of the answer, are put into each answer where vLLM puts them when it is asked for them.
    """

    def __init__(self, script: Script, token_ids: tuple[list[int], list[int]] | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self.endpoint = f"{self.url}/v1"
        self._script = script
        self._token_ids = token_ids

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        message = body["messages"][-1]["content"]
        self.calls.append((body["model"], message))
        found = self._script(body["model"], message)
        if isinstance(found, int) and found != 200:
            return found, _refusal(found)
        return 200, _completion(body, str(found), self._token_ids)


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
