"""The local AgentOps server, and the real AgentOps SDK that talks to it."""

from __future__ import annotations

import asyncio
import functools
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from agl_grpc.agentops import AgentOpsServerManager
from agl_grpc.agentops.daemon import find
from agl_grpc.store.door.app import StoreServer
from tests.doors.test_otlp import PROTOBUF, begin, request_of, stored
from tests.support.environments import REPOSITORY, agentlightning_python
from tests.support.scripted_model import ScriptedModel
from tests.support.waiting import free_port


def run_sdk(port: int, key: str, program: str, *arguments: str, **variables: str) -> None:
    """Runs a program that uses the SDK, with the OpenTelemetry of its day, against a server of ours."""
    environment = {
        **os.environ,
        "AGENTOPS_API_KEY": key,
        "AGENTOPS_API_ENDPOINT": f"http://127.0.0.1:{port}",
        "AGENTOPS_EXPORTER_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces",
        **variables,
    }
    command = [agentlightning_python(), str(REPOSITORY / "tests/doors" / program), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    # What is left is the SDK's farewell to a service for usage counts that is out of reach.
    process.kill()
    process.communicate()


@pytest.mark.e2e
async def test_the_sdk_works_offline_and_its_spans_reach_the_rollout(memory: StoreServer) -> None:
    started = await begin(memory)
    attempt = started.rollout.attempt
    with AgentOpsServerManager(store=memory.address) as manager:
        assert manager.is_alive()
        port = manager.get_port()
        assert port is not None
        await asyncio.to_thread(run_sdk, port, started.attempt_credential, "agentops_program.py")
        spans = {one.span.name: one.span for one in await stored(memory, attempt.rollout_id)}
        assert {"job.session", "Helper.agent", "think.task"} <= set(spans), spans.keys()
        assert spans["think.task"].parent_span_id == spans["Helper.agent"].span_id
    assert not manager.is_alive()


@pytest.mark.e2e
async def test_model_calls_that_the_sdk_instruments_land_under_the_rollout(memory: StoreServer) -> None:
    ids = ([1, 2, 3], [4, 5])
    with (
        ScriptedModel(lambda _model, _message: "four", ids) as model,
        AgentOpsServerManager(store=memory.address) as manager,
    ):
        port = manager.get_port()
        assert port is not None
        for extra in ((), ("agentlightning",)):
            started = await begin(memory)
            variables = {"OPENAI_BASE_URL": model.endpoint, "OPENAI_API_KEY": "none"}
            run = functools.partial(run_sdk, port, started.attempt_credential, **variables)
            await asyncio.to_thread(run, "agentops_llm_program.py", *extra)
            spans = await stored(memory, started.rollout.rollout.rollout_id)
            (call,) = [one.span for one in spans if one.span.name == "openai.chat.completion"]
            found = {entry.key: entry.value for entry in call.attributes}
            assert found["gen_ai.request.model"].string_value == "scripted"
            assert found["gen_ai.prompt.0.content"].string_value == "what is 2 + 2?"
            assert found["gen_ai.completion.0.content"].string_value == "four"
            # The SDK alone leaves token ids out; with Agent Lightning's addition they make a model call.
            assert call.HasField("model_call") == bool(extra)
            if extra:
                assert list(call.model_call.prompt.token_ids) == ids[0]
                assert list(call.model_call.choices[0].token_ids) == ids[1]
                assert call.model_call.sampling.temperature == 0.5
                assert call.model_call.untrainable_reason == "its span has no logprobs"
    assert [message for _, message in model.calls] == ["what is 2 + 2?"] * 2


async def test_what_the_sdk_calls_is_answered(memory: StoreServer) -> None:
    attempt = (await begin(memory)).rollout.attempt
    with AgentOpsServerManager(store=memory.address) as manager:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{manager.get_port()}") as http:
            token = (await http.post("/v3/auth/token", json={"api_key": "k"})).json()
            assert token == {"token": "k", "project_id": "agl-grpc", "project_prem_status": "pro"}
            assert (await http.post("/v3/auth/token", json={})).status_code == 422
            headers = {**PROTOBUF, "Authorization": "Bearer k"}
            body = request_of(attempt, b"thespan1").SerializeToString()
            assert (await http.post("/v1/traces", content=body, headers=headers)).status_code == 200
            assert len(await stored(memory, attempt.rollout_id)) == 1
            packed = {**headers, "Content-Encoding": "gzip"}
            faults: list[tuple[bytes, dict[str, str], int, str]] = [
                (b"{}", {"Content-Type": "application/json"}, 415, "MEDIA_TYPE_UNSUPPORTED"),
                (b"\xff\xff", headers, 400, "INVALID_ARGUMENT"),
                (gzip.compress(body)[:-4], packed, 400, "BODY_MALFORMED"),
                (gzip.compress(bytes(65 << 20), 1), packed, 413, "BODY_TOO_LARGE"),
                (body, {**PROTOBUF, "Authorization": "Bearer agl1.none"}, 401, "UNAUTHENTICATED"),
            ]
            for content, given, status, reason in faults:
                refused = await http.post("/v1/traces", content=content, headers=given)
                assert (refused.status_code, refused.json()["reason"]) == (status, reason), refused.text
            assert len(await stored(memory, attempt.rollout_id)) == 1
            for sent, given, status in (
                (b"", PROTOBUF, 200),
                (b"\xff\xff", PROTOBUF, 400),
                (b"{}", {"Content-Type": "application/json"}, 415),
            ):
                counts = await http.post("/v1/metrics", content=sent, headers=given)
                assert counts.status_code == status, counts.text
            usage = metrics_service_pb2.ExportMetricsServiceRequest()
            metric = usage.resource_metrics.add().scope_metrics.add().metrics.add(name="calls")
            metric.sum.data_points.add(as_int=1)
            counts = await http.post("/v1/metrics", content=usage.SerializeToString(), headers=PROTOBUF)
            told = metrics_service_pb2.ExportMetricsServiceResponse.FromString(counts.content)
            assert told.partial_success.rejected_data_points == 1
            assert (await http.post("/v4/logs/upload/", json={"body": "x"})).status_code == 200
            elsewhere = await http.get("/elsewhere")
            assert (elsewhere.status_code, elsewhere.json()["reason"]) == (404, "ROUTE_UNKNOWN")
            # The document of the store's own port is not there.
            assert "openapi.json" not in elsewhere.json()["detail"]
            # Last: a store that has gone is told apart from a server that has.
            await memory.stop()
            away = await http.post("/v1/traces", content=body, headers=headers, timeout=30)
            assert away.status_code == 503
            assert away.headers["retry-after"] == "1"


def test_a_manager_takes_a_free_port_and_may_start_again() -> None:
    manager = AgentOpsServerManager()
    assert manager.get_port() is None
    assert not manager.is_alive()
    manager.start()
    port = manager.get_port()
    assert manager.is_alive()
    with pytest.raises(RuntimeError, match=f"port {port} on 127.0.0.1 is in use"):
        AgentOpsServerManager(port=port).start()
    manager.stop()
    assert not manager.is_alive()
    manager.start()
    assert manager.get_port() == port
    manager.stop()


def command(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`agl-grpc agentops …`, with its process ids in a folder of the test's."""
    return subprocess.run(
        [sys.executable, "-m", "agl_grpc_cli", "agentops", *arguments],
        env={**os.environ, "XDG_RUNTIME_DIR": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_daemon_detaches_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    port = str(free_port())
    none: Any = command("status", "--port", port, home=tmp_path)
    assert (none.returncode, none.stderr.count("\n")) == (1, 1)
    started = command("--port", port, "--daemon", home=tmp_path)
    assert started.returncode == 0, started.stderr
    daemon = find(int(port))
    assert daemon is not None
    try:
        assert str(daemon.pid) in started.stdout
        assert psutil.Process(daemon.pid).terminal() is None
        assert os.getsid(daemon.pid) == daemon.pid
        assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
        assert str(daemon.pid) in command("status", "--port", port, home=tmp_path).stdout
        again = command("--port", port, "--daemon", home=tmp_path)
        assert again.returncode == 1
        assert "already" in again.stderr
        assert command("stop", "--port", port, home=tmp_path).returncode == 0
        assert not daemon.is_alive()
        assert command("stop", "--port", port, home=tmp_path).returncode == 1
    finally:
        if daemon.is_alive():
            os.kill(daemon.pid, signal.SIGKILL)


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    with AgentOpsServerManager() as manager:
        begun = time.monotonic()
        answer = command("--port", str(manager.get_port()), "--daemon", home=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: port {manager.get_port()} on 127.0.0.1 is in use"), answer.stderr
    assert time.monotonic() - begun < 30
