"""In front of a real vLLM: the tokens that it sampled, its own answers, agents that notice nothing."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from agl_grpc import LLM, LitAgentRunner, ProxyLLM, StoreClient, llm_rollout
from agl_grpc.interceptor.front.settings import UpstreamSpec
from agl_grpc.model.value import from_payload
from agl_grpc.v1 import model_call_pb2
from tests.interceptor.engine import Engine, engine
from tests.interceptor.front.rig import CHAT, proxy_before
from tests.interceptor.front.test_capture import recorded
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
_TEXTS = ("text", "content", "reasoning", "arguments")
PARSED: dict[str, dict[str, Any]] = {
    "a named tool": NAMED,
    "a required tool": {"tools": [WEATHER], "tool_choice": "required"},
    "tools, none called": {"tools": [WEATHER], "n": 2},
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": HELLO}),
    "chat, two answers": (CHAT, {"messages": HELLO, "n": 2}),
    "chat, own logprobs": (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
    "chat, own ids": (CHAT, {"messages": HELLO, "return_token_ids": True}),
    "chat, structured": (
        CHAT,
        {
            "messages": HELLO,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "weather", "schema": WEATHER["function"]["parameters"]},
            },
        },
    ),
    "completions": (COMPLETIONS, {"prompt": "hello"}),
    "completions, two prompts": (COMPLETIONS, {"prompt": ["hello", "red fox"], "n": 2}),
    "completions, ids": (COMPLETIONS, {"prompt": [5, 6, 7, 8], "logprobs": 1}),
}


def settled(answer: httpx.Response, stream: bool) -> Any:
    """What must be equal of two answers: all but ids and times."""
    assert answer.status_code == 200, answer.text

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            changing = ("id", "created", "system_fingerprint")
            return {name: cleaned(each) for name, each in value.items() if name not in changing}
        return [cleaned(each) for each in value] if isinstance(value, list) else value

    if not stream:
        return cleaned(answer.json())
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return folded([cleaned(json.loads(event)) for event in events[:-1]])


def folded(events: list[Any]) -> Any:
    """One answer of all events: how many tokens an event has differs from time to time."""
    whole: dict[str, Any] = {}
    for event in events:
        fold(whole, {**event, "choices": {choice.pop("index"): choice for choice in event["choices"]}})
    return whole


def fold(whole: dict[Any, Any], part: dict[Any, Any]) -> None:
    """Texts and lists are continued, objects folded, other values replaced."""
    for name, value in part.items():
        known = whole.get(name)
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(value, dict):
            whole[name] = known or {}
            fold(whole[name], value)
        elif name == "tool_calls":
            whole[name] = known or {}
            fold(whole[name], {call["index"]: call for call in value})
        elif known is not None and (isinstance(value, list) or name in _TEXTS):
            whole[name] = known + value
        else:
            whole[name] = value


def tokens_of(calls: list[Any]) -> list[tuple[list[int], int, list[int], str]]:
    """Prompt, index, ids and end of each choice."""
    return sorted(
        (prompt, choice.index, list(choice.token_ids), choice.finish_reason)
        for call, prompt in calls
        for choice in call.choices
    )


def logprobs_of(calls: list[Any]) -> list[float]:
    pairs = sorted((p, c.index, list(c.logprobs)) for call, p in calls for c in call.choices)
    return [value for _, _, values in pairs for value in values]


@pytest.fixture(scope="module")
def parsing(
    tiny_model: Path, store: ScriptedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine whose parsers hold text back."""
    folder = tmp_path_factory.mktemp("parsing")
    parsers = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    with engine(tiny_model, store.address, folder, "--engine-id", "parsing", *parsers) as started:
        yield started


@pytest.mark.parametrize("name", list(REQUESTS))
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_as_inside_and_as_without_us(
    running: Engine, store: ScriptedStore, scripted: ScriptedStore, tmp_path: Path, name: str, stream: bool
) -> None:
    path, request = REQUESTS[name]
    calls = await compared(running, store, scripted, tmp_path, path, {**request, "stream": stream})
    constrained = "sampled with structured_outputs=response_format json_schema"
    assert {call.untrainable_reason for call, _ in calls} == {constrained if "structured" in name else ""}


@pytest.mark.parametrize("name", list(PARSED))
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_where_parsers_hold_text_back(
    parsing: Engine, store: ScriptedStore, scripted: ScriptedStore, tmp_path: Path, name: str, stream: bool
) -> None:
    request = {"messages": HELLO, **PARSED[name], "stream": stream}
    calls = await compared(parsing, store, scripted, tmp_path, CHAT, request)
    constrained = "sampled with structured_outputs=tool_choice"
    assert {call.untrainable_reason for call, _ in calls} == {"" if "none" in name else constrained}


async def compared(
    running: Engine,
    store: ScriptedStore,
    scripted: ScriptedStore,
    folder: Path,
    path: str,
    request: dict[str, Any],
) -> list[Any]:
    """The calls captured in front, compared with those inside and with the bare engine's answers."""
    body = {"model": "tiny", "max_tokens": 24, "seed": 11, "temperature": 1.0, **request}
    stream = body["stream"]
    prompts = 2 if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], str) else 1
    rollout = f"inside-{uuid.uuid4().hex}"
    async with proxy_before(scripted.address, folder, UpstreamSpec(running.url)) as rig:
        bare = await rig.http.post(running.url + path, json=body)
        inside = await rig.http.post(running.base(rollout) + path, json=body)
        front = await rig.http.post(rig.base() + path, json=body)
        assert settled(front, stream) == settled(bare, stream)
        assert settled(front, stream) == settled(inside, stream)
        within = [(span.model_call, prompt) for span, prompt in store.calls_of(rollout)]
        calls = await recorded(scripted, count=prompts)
        # Without streaming the same request has the same tokens.
        whole = await rig.http.post(rig.base("whole") + path, json={**body, "stream": False})
        assert whole.status_code == 200
        others = await recorded(scripted, "whole", prompts)
    assert tokens_of(calls)
    assert [each[:3] for each in tokens_of(calls)] == [each[:3] for each in tokens_of(within)]
    assert [each[:3] for each in tokens_of(calls)] == [each[:3] for each in tokens_of(others)]
    assert logprobs_of(calls) == pytest.approx(logprobs_of(within), abs=1e-5)
    assert all(call.engine_version.startswith("vllm 0.") for call, _ in calls)
    return calls


async def test_the_anthropic_sdk_through_the_proxy(
    parsing: Engine, scripted: ScriptedStore, tmp_path: Path
) -> None:
    """Its answers are the engine's own; the records say that no ids are to be had from outside."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": HELLO}
    greedy = {"extra_body": {"temperature": 0}}

    def said(message: anthropic.types.Message) -> list[Any]:
        # The engine signs each thought with a number of its own.
        blocks = [{**block.to_dict(), "signature": None} for block in message.content]
        return [message.stop_reason, message.usage.output_tokens, *blocks]

    async with proxy_before(scripted.address, tmp_path, UpstreamSpec(parsing.url)) as rig:
        with anthropic.Anthropic(base_url=parsing.url, api_key="x") as bare:
            expected = said(await asyncio.to_thread(bare.messages.create, **asked, **greedy))
        with anthropic.Anthropic(base_url=rig.base(), api_key="x") as client:
            assert said(await asyncio.to_thread(client.messages.create, **asked, **greedy)) == expected
        async with anthropic.AsyncAnthropic(base_url=rig.base(), api_key="x", max_retries=0) as client:
            assert said(await client.messages.create(**asked, **greedy)) == expected
            async with client.messages.stream(**asked, **greedy) as stream:
                events = [event async for event in stream]
                assert said(await stream.get_final_message()) == expected
            counted = await client.messages.count_tokens(model="tiny", messages=asked["messages"])
            with pytest.raises(anthropic.NotFoundError, match="does not exist"):
                await client.messages.create(**{**asked, "model": "nobody"})
        calls = [call for call, _ in await recorded(scripted, count=4)]
    assert len(events) > 4
    assert counted.input_tokens > 0
    assert {call.api for call in calls} == {"messages"}
    assert all("no token ids" in call.untrainable_reason for call in calls)
    kept = [from_payload(call.raw_response) for call in calls[:2]]
    assert all(each["role"] == "assistant" for each in kept)


async def test_a_client_that_leaves_cuts_the_engines_generation(
    running: Engine, scripted: ScriptedStore, tmp_path: Path
) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 450, "ignore_eos": True, "stream": True}
    async with proxy_before(scripted.address, tmp_path, UpstreamSpec(running.url)) as rig:
        async with rig.http.stream("POST", rig.base() + COMPLETIONS, json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(20):
                await anext(lines)
        ((call, _),) = await recorded(scripted)

        async def idle() -> bool:
            metrics = (await rig.http.get(f"{running.url}/metrics")).text
            found = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
            return bool(found) and found[0].endswith(" 0.0")

        await eventually(idle, what="the engine has nothing to do")
    assert call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_CUT
    assert 1 <= len(call.choices[0].token_ids) == len(call.choices[0].logprobs) < 450


async def test_an_agent_with_a_proxy_resource_is_captured_from_end_to_end(
    running: Engine, tmp_path: Path
) -> None:
    @llm_rollout
    async def agent(task: str, llm: LLM) -> float:
        async with openai.AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "none") as client:
            messages: list[Any] = [{"role": "user", "content": task}]
            for _ in range(2):
                answer = await client.chat.completions.create(
                    model=llm.model, messages=messages, max_tokens=8
                )
                messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
                messages.append({"role": "user", "content": "go on"})
        return 1.0

    with StoreProcess(tmp_path / "store.db") as server:
        async with (
            StoreClient(server.address) as client,
            proxy_before(server.address, tmp_path, UpstreamSpec(running.url)) as rig,
        ):
            llm = ProxyLLM(
                endpoint=f"{rig.proxy.url}/v1", model="tiny", sampling_parameters={"temperature": 0.9}
            )
            await client.add_resources({"main_llm": llm})
            rollout = await client.enqueue_rollout(input="hello", mode="train")
            async with LitAgentRunner(max_rollouts=1).run_context(agent=agent, store=client) as runner:
                await asyncio.wait_for(runner.iter(), 60)
            done = await client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=30)
            assert [each.status for each in done] == ["succeeded"]

            async def calls() -> list[Any] | None:
                spans = await client.query_spans(rollout.rollout_id)
                found = [span.model_call for span in spans if span.model_call is not None]
                return found if len(found) == 2 else None

            found = await eventually(calls, what="both calls are in the store")
            assert found is not None
    assert [call.sampling["temperature"] for call in found] == [0.9, 0.9]
    assert {call.mode for call in found} == {"train"}
    assert all(len(call.choices[0].token_ids) == len(call.choices[0].logprobs) > 0 for call in found)
    assert len(found[1].prompt_token_ids) > len(found[0].prompt_token_ids)
