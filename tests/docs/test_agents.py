"""Every snippet of docs/agents.md runs as it stands there."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from agl_grpc_cli.main import app
from typer.testing import CliRunner

from agl_grpc import StoreClient
from agl_grpc.store.door.app import ServeConfig, StoreServer

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"


class _Engine(BaseHTTPRequestHandler):
    """Answers every chat completion with the right number."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "It is 4."}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = orjson.dumps(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def engine() -> Iterator[int]:
    """An endpoint of the OpenAI API; its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def snippets(language: str) -> list[str]:
    """The page's code in a language, in its order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_snippets_run(
    engine: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = types.ModuleType("docs_agents")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    for code in snippets("python"):
        code = code.replace("127.0.0.1:8000", f"127.0.0.1:{engine}")
        exec(compile(code, str(PAGE), "exec"), page.__dict__)
    told = capsys.readouterr().out
    assert re.search(r"^ro-\S+ 1\.0$", told, flags=re.MULTILINE), told
    assert "['agentlightning.message', '<lambda>']" in told
    asyncio.run(_with_a_store(page))


async def _with_a_store(page: types.ModuleType) -> None:
    server = await StoreServer.start(ServeConfig(port=0, database=None, grace=1.0))
    try:
        await page.try_one(server.address)
        async with StoreClient(server.address) as store:
            from agl_grpc import LitAgentRunner

            async with LitAgentRunner().run_context(agent=page.research, store=store) as runner:
                done = await runner.step("bees")
            found = page.read(await store.query_spans(done.rollout_id))
            solver = page.Solver()
            async with LitAgentRunner().run_context(agent=solver, store=store) as runner:
                trained = await runner.step(1, mode="train")
            rewards = await store.query_rewards([done.rollout_id, trained.rollout_id])
    finally:
        await server.stop()
    assert found["reward"] == 1.0
    assert found["said"] == ["looking around"]
    assert found["objects"] == [{"found": ["about bees"]}]
    by_rollout = {(r.rollout_id, r.name, r.step, bool(r.target_span_id)): r.value for r in rewards}
    assert {key[1:]: value for key, value in by_rollout.items() if key[0] == done.rollout_id} == {
        ("primary", None, False): 1.0,
        ("correct", None, False): 1.0,
        ("short", None, False): 0.0,
        ("style", None, False): 0.9,
        ("primary", 1, False): 0.25,
        ("primary", None, True): 0.5,
    }
    assert by_rollout[trained.rollout_id, "style", None, False] == 0.5


def test_the_commands_take_the_options_that_the_page_shows() -> None:
    lines = [
        *"".join(snippets("sh")).splitlines(),
        *re.findall(r"`(agl-grpc runner [^`]+)`", PAGE.read_text()),
    ]
    assert len(lines) >= 3
    told = CliRunner().invoke(app, ["runner", "start", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert told.exit_code == 0
    for line in lines:
        for option in re.findall(r"--[a-z-]+", line):
            assert option in told.output, f"{option} of: {line}"
