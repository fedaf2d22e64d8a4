"""Judges whose model is a real vLLM: its verdicts are read, stored and shown, and nonsense is never a 0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agl_grpc_cli.rollouts import app
from typer.testing import CliRunner

from agl_grpc.client import StoreClient
from agl_grpc.grader import Graders, GraderWorker
from agl_grpc.grader.judge import PairwiseJudge, RubricJudge
from agl_grpc.model import FailureKind, Span
from agl_grpc.store.door.app import ServeConfig, StoreServer
from tests.interceptor.engine import Engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TASK = {"question": "Name a prime number.", "answer": "7"}


@pytest.fixture
async def client() -> AsyncIterator[StoreClient]:
    server = await StoreServer.start(ServeConfig(port=0, http_port=None, database=None, grace=1.0))
    try:
        async with StoreClient(server.address, run_id="judged") as made:
            await made.create_run("judged")
            yield made
    finally:
        await server.stop()


async def _answered(client: StoreClient, answer: str) -> str:
    """A succeeded rollout whose agent said this."""
    started = await client.start_rollout(input=TASK)
    rollout_id, attempt_id = started.rollout_id, started.attempt.attempt_id
    said = {"agentlightning.message.body": answer}
    await client.add_span(Span(rollout_id=rollout_id, attempt_id=attempt_id, name="m", attributes=said))
    await client.update_attempt(rollout_id, attempt_id, "succeeded")
    return rollout_id


async def test_verdicts_of_a_real_model_are_stored_and_shown(running: Engine, client: StoreClient) -> None:
    where: dict[str, Any] = {"endpoint": f"{running.url}/v1", "task": "question", "max_tokens": 400}
    graders = Graders.of(
        [
            # The engine holds these two to the form; what a model of random weights decides is its affair.
            RubricJudge("tiny", {"right": "it is a prime"}, structured=True, **where),
            PairwiseJudge("tiny", structured=True, **where),
            RubricJudge("tiny", name="free", tries=2, retries=0, **where | {"max_tokens": 8}),
        ]
    )
    rollout_id = await _answered(client, "11")
    worker = GraderWorker(client, graders)
    try:
        counts = await worker.grade_all()
    finally:
        await worker.close()
    found = {reward.name: reward for reward in await client.query_rewards([rollout_id])}
    assert set(found) == {"rubric", "rubric/right", "pairwise", "free"}, counts
    rubric, pairwise, free = (found[name] for name in ("rubric", "pairwise", "free"))
    assert rubric.value is not None, rubric.failure
    assert rubric.value == pytest.approx(found["rubric/right"].value)
    assert 10 * rubric.value == pytest.approx(round(10 * rubric.value))
    assert pairwise.value in (0.0, 0.25, 0.5, 0.75, 1.0), pairwise.failure
    notes, pair = rubric.metadata or {}, pairwise.metadata or {}
    assert "Answer to judge:\n====\n11\n====" in notes["prompt"]
    assert '"scores"' in notes["reply"]
    assert notes["usage"]["completion_tokens"] > 0
    # Both orders were asked.
    assert "Answer A:\n====\n11\n====" in pair["first"]["prompt"]
    assert "Answer B:\n====\n11\n====" in pair["second"]["prompt"]
    assert free.value is None
    assert free.failure is not None
    assert (free.failure.kind, free.failure.type) == (FailureKind.GRADER, "unreadable_verdict")
    arguments = ["show", rollout_id, "--store", client.target, "--no-colour"]
    shown = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "reward  free = none  by free@1" in shown.output
    assert "no readable verdict in 2 tries" in shown.output
    assert "prompt: Task:" in shown.output
