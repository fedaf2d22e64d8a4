"""Real SDKs against a real vLLM whose parsers are on: what they get, and what is captured of it.

Judges are such clients too: their calls are held to a form, and belong to no attempt.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import anthropic
import httpx
import openai
import pytest
from agl_grpc_cli.rollouts import app as rollouts
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from typer.testing import CliRunner

from agl_grpc import StoreClient
from agl_grpc.grader import Graders, GraderWorker
from agl_grpc.grader.judge import Judge, PairwiseJudge, RubricJudge
from agl_grpc.model import Span, semconv
from agl_grpc.model.value import from_payload
from agl_grpc.v1 import model_call_pb2
from tests.interceptor.engine import Engine, engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.store_process import StoreProcess
from tests.support.tiny_vision_model import IMAGE_ID, IMAGE_TOKENS
from tests.support.torch_client import TorchClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TOOLS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    # A judge is shown two answers and what to look for.
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
)
REASONING = ("--reasoning-parser", "qwen3")
# The SDK knows no temperature any more; the server does.
GREEDY = {"temperature": 0.0}
HELLO: Any = [{"role": "user", "content": "hello world"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


@pytest.fixture(scope="module")
def with_tools(
    tiny_model: Path, store: ScriptedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine whose parser holds tool calls back."""
    with engine(tiny_model, store.address, tmp_path_factory.mktemp("tools"), *TOOLS) as started:
        yield started


@pytest.fixture(scope="module")
def with_reasoning(
    torch_client: TorchClient, store: ScriptedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine whose parser takes reasoning apart and whose model sees pictures.

    With such a parser grammars begin after the reasoning only.
    """
    folder = tmp_path_factory.mktemp("reasoning")
    torch_client.call("make_vision_model", folder=str(folder / "model"))
    with engine(folder / "model", store.address, folder, *REASONING) as started:
        yield started


def calls_of(store: ScriptedStore, rollout: str, count: int = 1) -> list[model_call_pb2.ModelCall]:
    """The captured calls of a rollout, each with as many logprobs as ids."""

    def enough() -> list[Any] | None:
        found = store.calls_of(rollout)
        return found if len(found) >= count else None

    calls = [span.model_call for span, _ in store.wait(enough, f"{count} calls of {rollout}")]
    assert len(calls) == count
    for call in calls:
        assert all(len(choice.logprobs) == len(choice.token_ids) > 0 for choice in call.choices)
    return calls


def ids(call: model_call_pb2.ModelCall) -> list[list[int]]:
    """Response token ids by choice."""
    return [list(choice.token_ids) for choice in sorted(call.choices, key=lambda choice: choice.index)]


class Clients:
    """SDK clients of attempts, closed at the end of a test."""

    def __init__(self, running: Engine) -> None:
        self._running = running
        self._made: list[Any] = []

    def openai(self, rollout: str) -> openai.OpenAI:
        return self._keep(openai.OpenAI, f"{self._running.base(rollout)}/v1")

    def openai_async(self, rollout: str) -> openai.AsyncOpenAI:
        return self._keep(openai.AsyncOpenAI, f"{self._running.base(rollout)}/v1")

    def anthropic(self, rollout: str) -> anthropic.Anthropic:
        return self._keep(anthropic.Anthropic, self._running.base(rollout))

    def anthropic_async(self, rollout: str) -> anthropic.AsyncAnthropic:
        return self._keep(anthropic.AsyncAnthropic, self._running.base(rollout))

    def langchain(self, rollout: str, **more: Any) -> ChatOpenAI:
        model = ChatOpenAI(
            base_url=f"{self._running.base(rollout)}/v1", api_key=SecretStr("x"), model="tiny", **more
        )
        self._made += [model.root_client, model.root_async_client]
        return model

    def _keep(self, kind: Any, url: str) -> Any:
        self._made.append(kind(base_url=url, api_key="x", max_retries=0, timeout=120))
        return self._made[-1]

    async def close(self) -> None:
        for client in self._made:
            ended = client.close()
            if ended is not None:
                await ended


@pytest.fixture
async def clients(with_tools: Engine) -> AsyncIterator[Clients]:
    made = Clients(with_tools)
    yield made
    await made.close()


@pytest.fixture
async def seeing(with_reasoning: Engine) -> AsyncIterator[Clients]:
    made = Clients(with_reasoning)
    yield made
    await made.close()


@pytest.fixture(params=["with_tools", "with_reasoning"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[Clients]:
    made = Clients(request.getfixturevalue(request.param))
    yield made
    await made.close()


@pytest.mark.parametrize(
    "more", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}], ids=["one", "n", "logprobs"]
)
def test_openai_chat_is_the_same_streamed_or_not(
    either: Clients, store: ScriptedStore, more: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    rollout = request.node.name
    client = either.openai(rollout)
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "seed": 5, **more}
    whole = client.chat.completions.create(**ask, extra_body={"return_token_ids": True})
    theirs = [choice.token_ids for choice in whole.choices]
    texts = [""] * len(whole.choices)
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            delta = choice.delta
            texts[choice.index] += (getattr(delta, "reasoning", None) or "") + (delta.content or "")
    first, second = calls_of(store, rollout, 2)
    assert ids(first) == ids(second) == theirs
    assert texts == [
        (getattr(c.message, "reasoning", None) or "") + (c.message.content or "") for c in whole.choices
    ]


async def test_openai_tools_in_parallel_streams(clients: Clients, store: ScriptedStore) -> None:
    client = clients.openai_async("tools")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 120, "seed": 1}
    forced = {"type": "function", "function": {"name": "weather"}}
    whole = await client.chat.completions.create(**ask, tool_choice=forced)
    (call,) = whole.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")

    async def stream() -> str:
        arguments = ""
        chunks = await client.chat.completions.create(**ask, tool_choice=forced, stream=True)
        async for chunk in chunks:
            for choice in chunk.choices:
                for part in choice.delta.tool_calls or []:
                    arguments += (part.function and part.function.arguments) or ""
        return arguments

    arguments = await asyncio.gather(*(stream() for _ in range(4)))
    assert set(arguments) == {call.function.arguments}
    found = calls_of(store, "tools", 5)
    assert all(ids(each) == ids(found[0]) for each in found)
    assert len({each.request_id for each in found}) == 5


def test_openai_required_tools_and_structured_output(clients: Clients, store: ScriptedStore) -> None:
    client = clients.openai("shaped")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 120, "seed": 3}
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    shaped = client.chat.completions.create(**ask, response_format=schema)
    message = shaped.choices[0].message
    assert json.loads(message.content or getattr(message, "reasoning", ""))["days"] in (1, 2, 3)
    (call,) = calls_of(store, "shaped")
    assert shaped.usage is not None
    assert len(call.choices[0].token_ids) == shaped.usage.completion_tokens


def test_several_tool_calls_of_one_answer_are_the_same_streamed_or_not(
    clients: Clients, store: ScriptedStore
) -> None:
    chat = clients.openai("several").chat.completions
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 400, "n": 8}
    ask |= {"tool_choice": "required", "seed": 4}
    whole = chat.create(**ask)
    said = [[each.function.arguments for each in c.message.tool_calls or []] for c in whole.choices]
    assert max(len(arguments) for arguments in said) > 1, "none of eight answers calls several tools"
    streamed: list[dict[int, str]] = [{} for _ in whole.choices]
    for chunk in chat.create(**ask, stream=True):
        for choice in chunk.choices:
            parts = streamed[choice.index]
            for part in choice.delta.tool_calls or []:
                arguments = (part.function and part.function.arguments) or ""
                parts[part.index] = parts.get(part.index, "") + arguments
    first, second = calls_of(store, "several", 2)
    assert ids(first) == ids(second)
    for choice, arguments, parts in zip(whole.choices, said, streamed, strict=True):
        if choice.finish_reason != "length":
            assert [json.loads(parts[index]) for index in sorted(parts)] == [*map(json.loads, arguments)]
    assert whole.usage is not None
    assert sum(map(len, ids(first))) == whole.usage.completion_tokens


def test_openai_completions_of_token_ids(clients: Clients, store: ScriptedStore) -> None:
    client = clients.openai("prompt-ids")
    answer = client.completions.create(model="tiny", prompt=[5, 6, 7, 8], max_tokens=9, n=2, seed=2)
    ((span, prompt),) = store.calls_of("prompt-ids")
    assert prompt == [5, 6, 7, 8]
    assert answer.usage is not None
    assert sum(len(choice.token_ids) for choice in span.model_call.choices) == answer.usage.completion_tokens


async def test_openai_responses(clients: Clients, store: ScriptedStore) -> None:
    client = clients.openai_async("responses")
    ask: dict[str, Any] = {
        "model": "tiny",
        "input": "hello world",
        "max_output_tokens": 16,
        "temperature": 0.0,
    }
    whole = await client.responses.create(**ask)
    events = [event.type async for event in await client.responses.create(**ask, stream=True)]
    assert events[0] == "response.created"
    assert events[-1] == "response.completed" or events[-1] == "response.incomplete"
    first, second = calls_of(store, "responses", 2)
    assert ids(first) == ids(second)
    assert first.api == "responses"
    assert whole.usage is not None
    assert len(first.choices[0].token_ids) == whole.usage.output_tokens


def test_anthropic_messages(clients: Clients, store: ScriptedStore) -> None:
    client = clients.anthropic("claude")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 16, "extra_body": GREEDY}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens
    first, second = calls_of(store, "claude", 2)
    assert first.api == "messages"
    assert ids(first) == ids(second)
    assert len(first.choices[0].token_ids) == whole.usage.output_tokens


async def test_anthropic_tools(clients: Clients, store: ScriptedStore) -> None:
    client = clients.anthropic_async("claude-tools")
    tools: Any = [{"name": "weather", "description": "the weather", "input_schema": CITY}]
    choice: Any = {"type": "tool", "name": "weather"}
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 120, "extra_body": GREEDY}
    whole = await client.messages.create(**ask, tools=tools, tool_choice=choice)
    (used,) = [block for block in whole.content if block.type == "tool_use"]
    async with client.messages.stream(**ask, tools=tools, tool_choice=choice) as stream:
        final = await stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [used.input]
    first, second = calls_of(store, "claude-tools", 2)
    assert ids(first) == ids(second)


async def test_langchain(clients: Clients, store: ScriptedStore) -> None:
    model = clients.langchain("langchain", max_tokens=100, temperature=0.0)
    tools = model.bind_tools([TOOL], tool_choice="weather")
    called = await tools.ainvoke("hello world")
    assert called.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")
    whole = model.invoke("hello world")
    streamed = [chunk async for chunk in model.astream("hello world")]
    assert "".join(str(chunk.content) for chunk in streamed) == whole.content
    _, second, third = calls_of(store, "langchain", 3)
    assert ids(second) == ids(third)


def picture(seed: int) -> str:
    """A PNG of 28 by 28 pixels, in base64."""
    pixels = random.Random(seed).randbytes(28 * 3)
    rows = b"".join(b"\0" + pixels for _ in range(28))

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    header = (28).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def asking(image: str) -> Any:
    """Messages in OpenAI's dialect, with a picture."""
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, url]}]


def test_an_image_for_a_text_model_is_refused_in_the_dialects_shape(
    clients: Clients, store: ScriptedStore
) -> None:
    with pytest.raises(openai.BadRequestError):
        clients.openai("image").chat.completions.create(
            model="tiny", messages=asking(picture(0)), max_tokens=3
        )
    ((span, _),) = store.calls_of("image")
    assert span.status.message.startswith("400: ")


def test_images_reach_the_model_and_their_calls_are_marked(seeing: Clients, store: ScriptedStore) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.0}
    chat = seeing.openai("picture").chat.completions
    whole = chat.create(**ask, messages=asking(picture(1)), extra_body={"return_token_ids": True})
    for _ in chat.create(**ask, messages=asking(picture(1)), stream=True):
        pass
    chat.create(**ask, messages=asking(picture(2)))
    source = {"type": "base64", "media_type": "image/png", "data": picture(1)}
    text = {"type": "text", "text": "what is it?"}
    seeing.anthropic("picture").messages.create(
        model="tiny",
        max_tokens=12,
        extra_body=GREEDY,
        messages=[{"role": "user", "content": cast(Any, [text, {"type": "image", "source": source}])}],
    )
    calls = calls_of(store, "picture", 4)
    prompts = [prompt for _, prompt in store.calls_of("picture")]
    assert [prompt.count(IMAGE_ID) for prompt in prompts] == [IMAGE_TOKENS] * 4
    assert prompts[0] == cast(Any, whole).prompt_token_ids
    assert ids(calls[0]) == ids(calls[1]) == ids(calls[3]) == [cast(Any, whole.choices[0]).token_ids]
    assert ids(calls[2]) != ids(calls[0]), "the model answers about another picture as about the first"
    assert all("multimodal prompt" in call.untrainable_reason for call in calls)
    # Their ids are the same: the picture's hash tells the prompts apart, the raw request has the picture.
    hashes = [
        [each.value.string_value for each in call.sampling.other if each.key == "multimodal.image.0"]
        for call in calls
    ]
    assert hashes[0] == hashes[1] == hashes[3] != hashes[2]
    assert len(hashes[0]) == 1
    assert picture(2) in json.dumps(from_payload(calls[2].raw_request))


async def test_eight_identical_parallel_prompts_are_eight_samples(
    clients: Clients, store: ScriptedStore
) -> None:
    client = clients.openai_async("eight")
    ask = (client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12) for _ in range(8))
    await asyncio.gather(*ask)
    found = calls_of(store, "eight", 8)
    assert len({call.request_id for call in found}) == 8
    assert len({tuple(ids(call)[0]) for call in found}) > 1


@pytest.fixture
async def judged(tmp_path: Path) -> AsyncIterator[StoreClient]:
    """A run of a real store."""
    with StoreProcess(tmp_path / "judged.db") as process:
        async with StoreClient(process.address, run_id="judged") as client:
            await client.create_run("judged")
            yield client


def counters(running: Engine) -> dict[str, Any]:
    """What the engine's interceptor counted."""
    found: dict[str, Any] = httpx.get(f"{running.url}/agl/interceptor", timeout=30).json()
    return found


async def _answered(client: StoreClient, answer: str) -> str:
    """A succeeded rollout whose agent said this."""
    started = await client.start_rollout(input={"question": "Name a prime number.", "answer": "7"})
    rollout_id, attempt_id = started.rollout_id, started.attempt.attempt_id
    said = {semconv.MESSAGE_BODY: answer}
    await client.add_span(Span(rollout_id=rollout_id, attempt_id=attempt_id, name="m", attributes=said))
    await client.update_attempt(rollout_id, attempt_id, "succeeded")
    return rollout_id


async def test_verdicts_of_judges_are_stored_and_shown(with_tools: Engine, judged: StoreClient) -> None:
    """What a model of random weights decides is its affair; that it is a verdict is the engine's."""
    before = counters(with_tools)
    where: dict[str, Any] = {"endpoint": f"{with_tools.url}/v1", "task": "question", "max_tokens": 400}
    # Of a character the model may write up to six tokens.
    held = {**where, "structured": True, "max_reasons": 20, "tries": 1, "retries": 0}
    free = {**where, "max_tokens": 8, "tries": 2, "retries": 0}
    rubric = RubricJudge("tiny", {"right": "it is a prime", "short": "one word"}, **held)
    judges: list[Judge] = [rubric, PairwiseJudge("tiny", **held), RubricJudge("tiny", name="free", **free)]
    rollout_id = await _answered(judged, "11")
    worker = GraderWorker(judged, Graders.of(judges))
    try:
        counts = await worker.grade_all()
    finally:
        await worker.close()
    found = {reward.name: reward for reward in await judged.query_rewards([rollout_id])}
    assert set(found) == {"rubric", "rubric/right", "rubric/short", "pairwise", "free"}, (counts, found)
    scores = [found[f"rubric/{name}"].value for name in ("right", "short")]
    assert all(score in [number / 10 for number in range(11)] for score in scores)
    assert found["rubric"].value == pytest.approx(sum(score or 0.0 for score in scores) / 2)
    notes, pair = found["rubric"].metadata or {}, found["pairwise"].metadata or {}
    assert "Answer to judge:\n====\n11\n====" in notes["prompt"]
    assert json.loads(notes["reply"], strict=False)["scores"].keys() == {"right", "short"}
    assert notes["usage"]["calls"] == 1
    # Both orders were asked, and the value is what the two winners make of it.
    assert "Answer A:\n====\n11\n====" in pair["first"]["prompt"]
    assert "Answer B:\n====\n11\n====" in pair["second"]["prompt"]
    shares = {"A": 1.0, "tie": 0.5, "B": 0.0}
    won = (shares[pair["first"]["winner"]] + 1.0 - shares[pair["second"]["winner"]]) / 2
    assert found["pairwise"].value == won
    # Eight tokens are no verdict, and no verdict is no 0.
    nothing = found["free"]
    assert (nothing.value, nothing.failure and nothing.failure.type) == (None, "unreadable_verdict")
    # A judge's calls belong to no attempt: none of them was captured to be trained.
    after = counters(with_tools)
    asked = sum(judge.usage.calls for judge in judges)
    assert (after["captured"], after["unattributed"]) == (before["captured"], before["unattributed"] + asked)
    arguments = ["show", rollout_id, "--store", judged.target, "--no-colour"]
    shown = await asyncio.to_thread(CliRunner().invoke, rollouts, arguments)
    assert shown.exit_code == 0, shown.output
    assert "reward  free = none  by free@1" in shown.output
    assert "no readable verdict in 2 tries" in shown.output
    assert "prompt: Task:" in shown.output
    assert "Answer to judge:" in shown.output
