"""APO with a real engine as the agent's model and as the critic: the plumbing, not the cleverness."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import openai
import pytest

from agl_grpc import LLM, NamedResources, PromptTemplate, ProxyLLM, StoreClient, rollout
from agl_grpc.algorithm import APO
from agl_grpc.algorithm.prompt.journal import journal_id, read_records
from tests.algorithm.conftest import Bench
from tests.interceptor.engine import Engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@rollout
async def talking(task: str, resources: NamedResources) -> float:
    """Has the model say something; the shorter the better."""
    prompt, proxy = resources["prompt"], resources["llm"]
    assert isinstance(prompt, PromptTemplate)
    assert isinstance(proxy, LLM)
    text = prompt.format(task=task)[:60]
    async with openai.AsyncOpenAI(base_url=proxy.endpoint, api_key=proxy.api_key or "none") as client:
        reply = await client.chat.completions.create(
            model=proxy.model, messages=[{"role": "user", "content": text}], max_tokens=8, seed=len(text)
        )
    return 1.0 / (1 + len(reply.choices[0].message.content or ""))


async def test_prompts_are_tried_criticised_and_rewritten_by_a_real_model(
    running: Engine, store: ScriptedStore, tmp_path: Path
) -> None:
    critique, edit = tmp_path / "critique.txt", tmp_path / "edit.txt"
    critique.write_text("{experiments}")
    edit.write_text("{name}")
    endpoint = f"{running.url}/v1"
    settings: dict[str, Any] = {"gradient_model": "tiny", "apply_edit_model": "tiny", "endpoint": endpoint}
    settings |= {"beam_width": 1, "branch_factor": 2, "beam_rounds": 2, "gradient_batch_size": 1}
    apo = APO(gradient_prompt_files=[critique], apply_edit_prompt_files=[edit], **settings)
    # jinja takes nearly any text for a template; what a model of random weights writes is no f-string.
    resources: NamedResources = {
        "prompt": PromptTemplate(template="hi", engine="jinja"),
        "llm": ProxyLLM(endpoint=endpoint, model="tiny"),
    }
    with StoreProcess(tmp_path / "apo.db") as process:
        bench = Bench(process.address, f"apo-{uuid.uuid4().hex[:8]}")
        async with bench.ready(apo, talking, resources) as notes:
            await apo.run(["a", "b"], ["c", "d"])
        async with StoreClient(process.address, run_id=bench.run_id) as client:
            records = await read_records(client, journal_id(bench.run_id, "apo"))
            rollouts = await client.query_rollouts()
    kinds = [record.kind for record in records]
    assert kinds.count("critique") == 4
    assert kinds[-1] == "end"
    # vLLM counted the critic's tokens, and every rollout was judged.
    assert notes.steps[2]["critic/calls"] >= 8
    assert notes.steps[2]["critic/prompt_tokens"] > 8 * 10
    assert notes.steps[2]["critic/completion_tokens"] > 0
    assert {item.status.value for item in rollouts} == {"succeeded"}
    assert notes.steps[2]["validation/best"] > 0
