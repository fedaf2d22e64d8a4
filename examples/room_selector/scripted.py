"""A stand-in for real models, so that the example has the same curve everywhere and needs no key.

As the agent's model it obeys exactly the rules that the prompt states, and takes the first room that
they leave. As the critic it names the first rule that is missing. What a real model does with the
prompts is for a real model to show.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from examples.room_selector.rooms import Room

RULES = {
    "seats": "The room must have enough seats for all people.",
    "equipment": "The room must have all the equipment that is needed.",
    "booked": "The room must not be booked at that hour.",
    "smallest": "Of several such rooms take the smallest.",
}


def answer(model: str, message: str) -> str:
    """What each of the three models says."""
    if model == "critic":
        prompt = re.search(r"```\n(.*?)\n```", message, re.DOTALL)
        missing = [rule for rule in RULES.values() if prompt is None or rule not in prompt[1]]
        return f"A rule is missing: {missing[0]}" if missing else "The prompt says all that is needed."
    if model == "editor":
        return _edit(message)
    return _choose(message)


def _edit(message: str) -> str:
    prompt = re.search(r"```\n(.*?)\n```", message, re.DOTALL)
    assert prompt is not None, "the editor is always shown the prompt"
    rule = re.search(r"A rule is missing: (.*)", message)
    head, _, tail = prompt[1].partition("\nRequest:")
    return f"```\n{head}{' ' + rule[1] if rule else ''}\nRequest:{tail}\n```"


def _choose(prompt: str) -> str:
    request = re.search(r"Request: (\d+) people at (\d+):00, needs: (.*)", prompt)
    assert request is not None, "the prompt keeps the request"
    people, hour, needs = int(request[1]), int(request[2]), _list(request[3])
    rooms = [
        Room(name, int(seats), tuple(_list(equipment)), tuple(map(int, re.findall(r"(\d+):00", booked))))
        for name, seats, equipment, booked in re.findall(
            r"^([A-H]): (\d+) seats; equipment: (.*); booked at: (.*)$", prompt, re.MULTILINE
        )
    ]
    if RULES["seats"] in prompt:
        rooms = [room for room in rooms if room.seats >= people]
    if RULES["equipment"] in prompt:
        rooms = [room for room in rooms if set(needs) <= set(room.equipment)]
    if RULES["booked"] in prompt:
        rooms = [room for room in rooms if hour not in room.booked]
    if RULES["smallest"] in prompt:
        rooms.sort(key=lambda room: room.seats)
    return f"room: {rooms[0].name}" if rooms else "no room fits"


def _list(text: str) -> list[str]:
    return [] if text == "nothing" else text.split(", ")


@contextmanager
def scripted_endpoint() -> Iterator[str]:
    """Serves the models; the base URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text = answer(body["model"], prompt)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        used = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        data = json.dumps(
            {
                "id": "scripted",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
                "usage": {**used, "total_tokens": sum(used.values())},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
