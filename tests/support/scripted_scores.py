"""A reward model's endpoint whose scores a test writes, in the form of vLLM's ``/classify``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.scripted_server import ScriptedServer


class ScriptedScores(ScriptedServer):
    """Scores texts on a random port of the loopback interface; a context manager.

    ``asked`` are the model and the text of every request, in their order.
    """

    def __init__(self, score: Callable[[str], float]) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self.endpoint = self.url
        self._score = score

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path != "/classify":
            return 404, {}
        self.asked.append((body["model"], body["input"]))
        return 200, {"data": [{"index": 0, "probs": [self._score(body["input"])]}]}
