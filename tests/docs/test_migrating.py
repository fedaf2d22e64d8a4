"""docs/migrating.md, section by section, as a new user follows it; only ports and folders are our own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import agl_grpc as agl
from agl_grpc.client import SyncStoreClient
from agl_grpc.model import Choice, ModelCall, ModelCallOutcome, Span
from agl_grpc.model.model_call import token_ids
from tests.support.environments import agentlightning_python
from tests.support.store_process import wait_until_serving
from tests.support.waiting import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
SECTIONS = dict(zip("0123456", re.split(r"^## ", PAGE, flags=re.MULTILINE), strict=False))


def command(section: str, begin: str, **ports: int) -> list[str]:
    """A command of a section, with the ports that are ours for the page's."""
    (text,) = {found for found in re.findall(r"`([^`]+)`", SECTIONS[section]) if found.startswith(begin)}
    for old, new in ports.items():
        text = text.replace(old.removeprefix("port"), str(new))
    words = shlex.split(text)
    assert words[0] == "agl-grpc"
    return [sys.executable, "-m", "agl_grpc_cli", *words[1:]]


@contextlib.contextmanager
def running(arguments: list[str], folder: Path) -> Iterator[Path]:
    """A command in the background; its log."""
    log = folder / "output.log"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output, cwd=folder, env=environment)
    try:
        yield log
    finally:
        process.terminate()
        assert process.wait(20) == 0, log.read_text()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """The store of section 1, started by its command; its gRPC and its HTTP port."""
    grpc_port, http_port = free_port(), free_port()
    folder = tmp_path_factory.mktemp("migrating")
    with running(
        command("1", "agl-grpc store --port", port4748=grpc_port, port4747=http_port), folder
    ) as log:
        wait_until_serving(f"127.0.0.1:{grpc_port}", log, 30)
        yield grpc_port, http_port
    assert (folder / "agl-grpc.db").exists()


def call(port: int, path: str, body: Any = None, **headers: str) -> Any:
    """One request with urllib, as a program without our packages sends it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def test_section_1_the_store(ports: tuple[int, int]) -> None:
    _, http = ports
    for prefix in ("/agl/v1", "/v1/agl"):
        assert call(http, f"{prefix}/openapi.json")["openapi"].startswith("3.")
        assert call(http, f"{prefix}/health")
    first, second = [
        call(http, "/v1/agl/rollouts", {"input": 1}, **{"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert first["rollout_id"] == second["rollout_id"]


@pytest.mark.e2e
def test_section_1_the_old_client(ports: tuple[int, int]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", SECTIONS["1"], flags=re.DOTALL)
    program = snippet.replace("4747", str(ports[1])) + (
        "import asyncio\n"
        "started = asyncio.run(store.start_rollout(input={'n': 1}))\n"
        "print(started.status, started.input)\n"
    )
    done = subprocess.run(
        [agentlightning_python(), "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "preparing {'n': 1}\n", done.stderr


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_section_2_opentelemetry(ports: tuple[int, int], way: str) -> None:
    grpc_port, http_port = ports
    rollout = call(http_port, "/agl/v1/rollouts", {"input": 1})
    names = re.findall(r"^(agentlightning\.\w+) +(agentlightning\.\w+) ", SECTIONS["2"], flags=re.MULTILINE)
    ids = (rollout["rollout_id"], rollout["attempt"]["attempt_id"])
    exporter = (
        GrpcExporter(endpoint=f"http://localhost:{grpc_port}", insecure=True)
        if way == "grpc"
        else HttpExporter(endpoint=f"http://localhost:{http_port}/v1/traces")
    )
    provider = TracerProvider(
        resource=Resource.create(dict(zip(names[0], ids, strict=True))), shutdown_on_exit=False
    )
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("mine").start_as_current_span("step"):
        pass
    provider.shutdown()
    (shown,) = call(http_port, f"/agl/v1/spans?rollout_id={ids[0]}")["items"]
    assert (shown["name"], shown["attempt_id"]) == ("step", ids[1])


def test_section_3_agentops(ports: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    port = free_port()
    start = command("3", "agl-grpc agentops --port", port8002=port, port4748=ports[0])
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}

    def told(*arguments: str) -> str:
        done = subprocess.run(
            arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told(*start, "--daemon")
    try:
        assert call(port, "/v3/auth/token", {"api_key": "k"})["token"] == "k"
        assert str(port) in told(*start[:4], "status", "--port", str(port))
    finally:
        told(*start[:4], "stop", "--port", str(port))


def test_section_4_the_model(ports: tuple[int, int]) -> None:
    """Token ids of a captured call are in the attributes that REST readers look at."""
    words = command("4", "agl-grpc vllm serve MODEL --store")
    shown = subprocess.run(
        [*words[:5], "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "COLUMNS": "200"},
        timeout=60,
        check=False,
    )
    assert "--store" in shown.stdout, shown
    endpoint = agl.ProxyLLM(endpoint="http://host:8000/v1", model="m")
    with SyncStoreClient(f"127.0.0.1:{ports[0]}") as client:
        rollout = client.start_rollout(1)
        attempt_id = rollout.attempt.attempt_id
        captured = ModelCall(
            model=endpoint.model,
            prompt_token_ids=token_ids([1, 2]),
            choices=[Choice(token_ids=token_ids([3]), logprobs=np.array([-0.5], dtype=np.float32))],
            outcome=ModelCallOutcome.COMPLETE,
        )
        client.add_span(
            Span(rollout_id=rollout.rollout_id, attempt_id=attempt_id, name="call", model_call=captured)
        )
    (one,) = call(ports[1], f"/agl/v1/spans?rollout_id={rollout.rollout_id}")["items"]
    assert one["attributes"]["prompt_token_ids"] == [1, 2]
    assert one["attributes"]["response_token_ids"] == [3]


def test_section_5_the_program(ports: tuple[int, int], tmp_path: Path) -> None:
    """A program in the way of Agent Lightning's, with the import changed and nothing else."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", SECTIONS["5"], flags=re.MULTILINE)
    kept = " ".join(before for before, now in rows if now.startswith("the same"))
    for name in re.findall(r"`@?(?:agl\.)?([A-Za-z_]+)[^`]*`", kept):
        assert hasattr(agl, name), name
    program = tmp_path / "mine.py"
    program.write_text(
        "import agl_grpc as agl\n"
        "@agl.rollout\n"
        "def agent(task, resources):\n"
        "    agl.emit_reward(task['n'] / 2)\n"
        "@agl.algo\n"
        "async def twice(store, train_dataset, val_dataset):\n"
        "    made = [await store.enqueue_rollout(one) for one in [*train_dataset, *val_dataset]]\n"
        "    ids = [one.rollout_id for one in made]\n"
        "    await store.wait_for_rollouts(rollout_ids=ids, timeout=60)\n"
        "    return sum([agl.find_final_reward(await store.query_spans(one)) for one in ids])\n"
        "if __name__ == '__main__':\n"
        f"    trainer = agl.Trainer(algorithm=twice, store='127.0.0.1:{ports[0]}', run_name='moved')\n"
        "    print(trainer.fit(agent, [{'n': 2}, {'n': 4}], val_dataset=[{'n': 6}]).value)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["6.0"], done.stderr
