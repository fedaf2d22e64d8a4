"""The routes of Agent Lightning 0.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from agl_grpc import (
    AgentLightningClient,
    AgentLightningServer,
    DevTaskLoader,
    PromptTemplate,
    RolloutLegacy,
)
from agl_grpc.store.door.app import StoreServer
from tests.doors.test_agentlightning import run_peer
from tests.doors.test_otlp import stored
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port


async def test_a_task_is_taken_and_reported(memory: StoreServer, http: httpx.AsyncClient) -> None:
    assert (await http.get("/task")).json() == {"is_available": False, "task": None}
    assert (await http.get("/resources/latest")).status_code == 404
    prompt = {"p": {"resource_type": "prompt_template", "template": "hi", "engine": "f-string"}}
    published = (await http.post("/agl/v1/resources", json=prompt)).json()
    assert (await http.get("/resources/latest")).json() == published
    assert (await http.get(f"/resources/{published['resources_id']}")).json() == published
    assert (await http.get("/resources/rs-none")).status_code == 404

    body = {"rollouts": [{"input": {"q": 1}, "mode": "train", "metadata": {"m": 1}}]}
    await http.post("/agl/v1/queues/rollouts/enqueue", json=body)
    task = (await http.get("/task")).json()
    assert task["is_available"]
    task = task["task"]
    assert (task["input"], task["mode"], task["metadata"], task["num_claims"]) == (
        {"q": 1},
        "train",
        {"m": 1},
        1,
    )
    report = {
        "rollout_id": task["rollout_id"],
        "final_reward": 0.5,
        "triplets": [
            {"prompt": {"token_ids": [1, 2]}, "response": {"token_ids": [3]}, "reward": 0.25, "metadata": {}}
        ],
        "logs": ["a line"],
        "trace": [{"name": "x"}],
        "metadata": {},
    }
    assert (await http.post("/rollout", json=report)).json()["status"] == "ok"
    rollout = (await http.get(f"/agl/v1/rollouts/{task['rollout_id']}")).json()
    assert rollout["status"] == "succeeded"
    triplet, rest, reward = await stored(memory, task["rollout_id"])
    assert list(triplet.span.model_call.prompt.token_ids) == [1, 2]
    assert list(triplet.span.model_call.choices[0].token_ids) == [3]
    kept = {one.key: one.value for one in triplet.span.attributes}
    assert [one.int_value for one in kept["prompt_token_ids"].array_value.values] == [1, 2]
    assert json.loads(kept["agentlightning.triplet"].string_value) == report["triplets"][0]
    assert rest.span.name == "agentlightning.report"
    assert {one.key: one.value for one in reward.span.attributes}[
        "agentlightning.reward.0.value"
    ].double_value == 0.5
    # Its answer was lost: it is reported again.
    assert (await http.post("/rollout", json=report)).status_code == 200
    assert len(await stored(memory, task["rollout_id"])) == 3


async def test_of_a_report_that_is_refused_nothing_is_kept(http: httpx.AsyncClient) -> None:
    rollout = (await http.post("/agl/v1/rollouts", json={"input": 1})).json()
    good = {"prompt": {"token_ids": [1, 2]}, "response": {"token_ids": [3]}}
    report = {"rollout_id": rollout["rollout_id"], "final_reward": 0.5, "triplets": [good]}
    huge = {**good, "metadata": {"text": "x" * (5 << 20)}}
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({}, 422, "rollout_id"),
        ({"rollout_id": "ro-none"}, 404, None),
        ({**report, "triplets": [3]}, 422, "triplets[0]"),
        ({**report, "triplets": [good, huge]}, 422, "triplets[1]"),
        ({**report, "logs": 3}, 422, "logs"),
        ({**report, "metadata": []}, 422, "metadata"),
    ]
    for bad, status, field in cases:
        answer = await http.post("/rollout", json=bad)
        assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    path = f"/agl/v1/rollouts/{rollout['rollout_id']}"
    assert (await http.get(f"{path}/attempts/latest")).json()["status"] == "preparing"
    await http.post(f"{path}/attempts/latest", json={"status": "failed"})
    late = await http.post("/rollout", json=report)
    assert (late.status_code, late.json()["reason"]) == (409, "ILLEGAL_TRANSITION")
    assert (await http.get("/agl/v1/statistics")).json()["total_spans"] == 0


@pytest.mark.e2e
def test_the_released_legacy_client_works(tmp_path: Path) -> None:
    port = free_port()
    with StoreProcess(tmp_path / "store.db", "--http-port", str(port)):
        assert json.loads(run_peer("peer_legacy.py", f"http://127.0.0.1:{port}")) == {"reported": 2}


async def test_the_legacy_names_warn_and_work() -> None:
    with pytest.warns(DeprecationWarning, match="StoreClient"):
        server = AgentLightningServer(port=0)
    with pytest.raises(RuntimeError, match="call start first"):
        await server.queue_task(1)
    await server.start()
    try:
        resources_id = await server.update_resources({"p": PromptTemplate(template="hi {x}")})
        rollout_id = await server.queue_task({"q": 1}, mode="train", resources_id=resources_id)
        assert await server.get_completed_rollout(rollout_id) is None
        with pytest.warns(DeprecationWarning, match="AgentLightningClient"):
            client = AgentLightningClient(server.endpoint)
        task = await client.poll_next_task_async()
        assert task is not None
        assert (task.rollout_id, task.input, task.resources_id) == (rollout_id, {"q": 1}, resources_id)
        update = await client.get_resources_by_id_async(resources_id)
        assert update is not None
        assert update.resources == {"p": PromptTemplate(template="hi {x}")}
        assert await client.get_latest_resources_async() == update
        assert await client.get_resources_by_id_async("rs-none") is None
        triplet = {
            "prompt": {"token_ids": [1]},
            "response": {"token_ids": [2]},
            "reward": 0.5,
            "metadata": {},
        }
        report = RolloutLegacy(
            rollout_id=rollout_id, final_reward=1.0, triplets=[triplet], logs=["a"], metadata={"m": 1}
        )
        told = await client.post_rollout_async(report)
        assert told is not None
        assert await server.poll_completed_rollout(rollout_id, timeout=5) == report
        assert await server.get_completed_rollout(rollout_id) is None
        assert await server.retrieve_completed_rollouts() == []
    finally:
        await server.stop()


def test_a_task_loader_needs_no_server() -> None:
    with pytest.warns(DeprecationWarning, match="DevTaskLoader"):
        loader = DevTaskLoader([1, 2], {"p": PromptTemplate(template="hi")})
    inputs = [task.input for _ in range(3) if (task := loader.poll_next_task()) is not None]
    assert inputs == [1, 2, 1]
    assert loader.get_latest_resources().resources["p"] == PromptTemplate(template="hi")
    with pytest.raises(ValueError, match="unknown"):
        loader.get_resources_by_id("other")
    loader.post_rollout(RolloutLegacy(rollout_id="local_task_001", final_reward=1.0))
    assert [one.final_reward for one in loader.rollouts] == [1.0]
