"""The real agentops package, offline, and real LangChain callbacks, into our traces.

AgentOps patches its whole process, so what is checked of it runs in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.tracer import OtelTracer

ROOT = Path(__file__).parents[2]

OFFLINE = """
import asyncio, json, sys
asked = []
def on_event(event, arguments):
    if event == "socket.getaddrinfo":
        asked.append(str(arguments[0]))
    if event == "socket.connect":
        asked.append(str(arguments[1][0]))
sys.addaudithook(on_event)

from agl_grpc.tracer import AgentOpsTracer
tracer = AgentOpsTracer()
tracer.init()
tracer.init()

import agentops, openai
from agentops.sdk.decorators import agent, operation, tool

@tool
def double(x): return x * 2

@agent
class Doubler:
    @operation
    async def run(self, x):
        await asyncio.sleep(0)
        return double(x)

async def attempt(number):
    async with tracer.trace_context(f"attempt {number}") as trace:
        agentops.init(api_key="00000000-0000-0000-0000-000000000000")
        await Doubler().run(number)
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
        try:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        except openai.APIConnectionError:
            pass
    return [[span.name, f"{span.context.trace_id:032x}"] for span in trace.spans]

async def main():
    return await asyncio.gather(*map(attempt, range(4)))

traces = asyncio.run(main())
tracer.teardown()
print(json.dumps({"traces": traces, "asked": sorted(set(asked))}))
"""


def test_agentops_records_into_our_traces_and_nothing_leaves_the_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "AGENTOPS_API_KEY": "k", "HOME": str(tmp_path)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer["asked"]) <= {"127.0.0.1", "::1", "localhost"}
    assert not list(tmp_path.glob("*.log"))
    for number, spans in enumerate(answer["traces"]):
        names = [name for name, _ in spans]
        assert sorted(names) == sorted(
            ["double.tool", "run.task", "Doubler.agent", "openai.chat.completion", f"attempt {number}"]
        )
        assert len({trace_id for _, trace_id in spans}) == 1
    assert len({spans[0][1] for spans in answer["traces"]}) == 4


def test_without_the_package_the_way_to_get_it_is_told() -> None:
    code = (
        "import sys; sys.modules['agentops'] = None\n"
        "from agl_grpc.tracer import AgentOpsTracer\n"
        "AgentOpsTracer().init()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: AgentOpsTracer needs the package agentops: pip install 'agl-grpc[agentops]'"
    )


@pytest.fixture
def tracer() -> Iterator[OtelTracer]:
    made = OtelTracer(install_globally=False)
    yield made
    made.teardown()


async def test_langchain_runs_become_spans_of_the_trace(tracer: OtelTracer) -> None:
    from langchain_core.language_models.fake_chat_models import FakeListChatModel
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnableLambda

    def broken(_: Any) -> str:
        raise ValueError("no parser")

    model = FakeListChatModel(responses=["four"])
    chain = ChatPromptTemplate.from_messages([("system", "count"), ("human", "{x}")]) | model
    handler = tracer.get_langchain_handler(tags=["a test"])
    await chain.ainvoke({"x": "1"}, config={"callbacks": [handler]})  # outside any trace: nothing is recorded
    async with tracer.trace_context("agent") as trace:
        answer = await chain.ainvoke({"x": "2 + 2"}, config={"callbacks": [handler]})
        with pytest.raises(ValueError, match="no parser"):
            await (chain | RunnableLambda(broken)).ainvoke({"x": "3"}, config={"callbacks": [handler]})
    assert answer.content == "four"
    by_name = {span.name: span for span in trace.spans}
    call = by_name["langchain.ChatModel.FakeListChatModel"]
    attributes = dict(call.attributes or {})
    assert attributes["gen_ai.prompt.0.role"] == "system"
    assert attributes["gen_ai.completion.0.content"] == "four"
    assert attributes["lc_name"] == "FakeListChatModel"
    assert attributes["tags"] == ("a test",)
    ids = {span.context.span_id for span in trace.spans if span.context}
    assert all(span.parent is None or span.parent.span_id in ids for span in trace.spans)
    assert {span.context.trace_id for span in trace.spans if span.context} == {trace.trace_id}
    failed = by_name["langchain.Chain.broken"]
    assert not failed.status.is_ok
    assert failed.status.description == "no parser"
