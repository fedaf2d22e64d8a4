"""`HttpGrader` against real endpoints: what is told, how answers are read, and what is tried again."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agl_grpc.grader import GraderFailed, Submission
from agl_grpc.grader.http import HttpGrader
from agl_grpc.grader.isolated import graded
from agl_grpc.grader.verdict import ask

ONE = Submission(
    input={"answer": "4"}, response="4", rollout_id="r", messages=[{"role": "user", "content": "?"}]
)
Answer = Callable[[Any], tuple[int, bytes]]


@contextmanager
def served(answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """An endpoint, and what it was told."""
    told: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told.append((body, self.headers.get("authorization")))
            status, data = answer(body)
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args: object) -> None:
            """Nothing on standard error."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/grade", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_the_endpoint_is_told_the_submission_and_its_answer_is_the_grade() -> None:
    def answer(body: Any) -> tuple[int, bytes]:
        value = float(body["response"] == body["input"]["answer"])
        return 200, json.dumps({"value": value, "components": {"form": 0.5}, "notes": {"why": "so"}}).encode()

    with served(answer) as (url, told):
        grade = await HttpGrader(url, headers={"authorization": "Bearer s"}).grade(ONE)
    assert (grade.value, grade.components, grade.notes) == (1.0, {"form": 0.5}, {"why": "so"})
    ((body, bearer),) = told
    assert (body["rollout_id"], body["messages"][0]["content"], bearer) == ("r", "?", "Bearer s")


@pytest.mark.parametrize(
    ("status", "data", "outcome", "tries"),
    [
        (503, b"", "http", 2),
        (429, b"", "http", 2),
        (404, b"", "http", 1),
        (200, b"very good", "not_a_grade", 1),
        (200, b"NaN", "not_a_grade", 1),
        (200, b'{"value": "1"}', "not_a_grade", 1),
        (200, b"1" * ((1 << 20) + 1), "not_a_grade", 1),
    ],
)
async def test_what_is_no_grade_is_counted_and_only_what_may_pass_is_tried_again(
    status: int, data: bytes, outcome: str, tries: int
) -> None:
    with served(lambda _: (status, data)) as (url, told):
        verdict = await ask(HttpGrader(url, retries=1), ONE, graded)
    assert verdict.grade is None
    assert (verdict.outcome, verdict.tries, len(told)) == (outcome, tries, tries)


async def test_an_endpoint_that_comes_back_is_asked_again() -> None:
    statuses = [503, 200]
    with served(lambda _: (statuses.pop(0), b"0.25")) as (url, _):
        verdict = await ask(HttpGrader(url), ONE, graded)
    assert verdict.grade is not None
    assert (verdict.grade.value, verdict.tries) == (0.25, 2)


async def test_nobody_there_and_a_wrong_url_are_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
        with pytest.raises(GraderFailed, match="does not answer") as caught:
            await HttpGrader(url).grade(ONE)
    assert caught.value.outcome == "http"
    with pytest.raises(ValueError, match="must begin with http"):
        HttpGrader("ftp://x/")
