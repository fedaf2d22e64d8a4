"""A worker with a tracer of the user's choice: real AgentOps, many rollouts at once, each under its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_agentops_in_a_worker(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, isolation: str
) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    options = ["--run", run_id, "--concurrency", "8", "--isolation", isolation]
    options += ["--tracer", "agl_grpc:AgentOpsTracer"]
    count = 16 if isolation == "thread" else 2
    requests = [EnqueueRolloutRequest(input={"number": n, "url": url}) for n in range(count)]
    with RunnerProcess(store.address, "tests.runner.traced_agent:TracedAgent", folder, *options) as runner:
        rollouts = await client.enqueue_many_rollouts(requests)
        ids = [rollout.rollout_id for rollout in rollouts]
        ended = await client.wait_for_rollouts(rollout_ids=ids, timeout=60, until="sealed")
        assert {rollout.status for rollout in ended} == {"succeeded"}, runner.log.read_text()
    for number, rollout_id in enumerate(ids):
        spans = await client.query_spans(rollout_id)
        names = sorted(span.name for span in spans)
        own = [rollout_id, "agentlightning.annotation", "openai.chat.completion", f"tool-{number}.tool"]
        assert names == sorted(own)
        (call,) = [span for span in spans if span.name == "openai.chat.completion"]
        assert call.attributes["gen_ai.prompt.0.content"] == str(number)
