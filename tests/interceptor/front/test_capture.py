"""What clients get and what is recorded, dialect by dialect."""

from __future__ import annotations

import base64
import gc
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from agl_grpc.interceptor import attempts
from agl_grpc.interceptor.front.settings import UpstreamSpec
from agl_grpc.model.value import from_payload
from agl_grpc.v1 import model_call_pb2
from tests.interceptor.front.fake_engine import (
    LOGPROBS,
    PROMPT,
    TOKENS,
    FakeEngine,
    answer_of,
    events_of,
)
from tests.interceptor.front.rig import CHAT, HELLO, Rig, proxy_before
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.waiting import eventually

COMPLETIONS = "/v1/completions"
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hello"}


async def recorded(store: ScriptedStore, rollout: str = "ro-1", count: int = 1) -> list[Any]:
    """The calls of a rollout, once so many are in the store."""
    calls = await eventually(
        lambda: found if len(found := store.calls_of(rollout)) >= count else None, what=f"{count} calls"
    )
    assert calls is not None
    assert len(calls) == count
    return [(span.model_call, prompt) for span, prompt in calls]


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, TEXT)])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "asked", [{}, {"logprobs": 1}, {"logprobs": 0}, {"return_token_ids": True}, {"n": 2}]
)
async def test_clients_get_the_engines_own_answer_and_the_store_the_ids(
    scripted: ScriptedStore,
    engine: FakeEngine,
    tmp_path: Path,
    path: str,
    body: dict[str, Any],
    stream: bool,
    asked: dict[str, Any],
) -> None:
    n = asked.get("n", 1)
    if stream and n > 1:
        asked = {"stream_options": {"include_usage": True}}
        n = 1
    request = {**body, **asked, "stream": stream}
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.http.post(rig.base() + path, json=request)
        assert answer.status_code == 200
        if stream:
            expected = events_of(path, request)
            got = [event + b"\n\n" for event in answer.content.split(b"\n\n") if event]
            assert [_json(event) for event in got] == [_json(event) for event in expected]
            assert got[-1] == b"data: [DONE]\n\n"
        else:
            assert answer.json() == answer_of(path, request)
        ((call, prompt),) = await recorded(scripted)
    assert prompt == PROMPT
    assert call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
    assert call.untrainable_reason == ""
    assert (call.mode, call.model, call.request_id, call.engine_version) == (
        "train", "tiny", "answer-1", "vllm 0.0.1",
    )  # fmt: skip
    assert [choice.index for choice in call.choices] == list(range(n))
    for choice in call.choices:
        assert list(choice.token_ids) == [token + 100 * choice.index for token in TOKENS]
        assert list(choice.logprobs) == LOGPROBS
        assert choice.finish_reason == "stop"
        assert [(r.start, r.end, r.policy_version) for r in choice.policy_runs] == [(0, 3, 0)]
    assert call.sampling.temperature == call.sampling.top_p == 1.0
    assert call.logprob_semantics == model_call_pb2.LOGPROB_SEMANTICS_RAW
    assert call.timings.total_ns >= call.timings.first_token_ns > 0
    assert call.raw_request.data
    assert call.raw_response.data


def _json(event: bytes) -> Any:
    data = event.removeprefix(b"data: ").strip()
    return data if data == b"[DONE]" else json.loads(data)


async def test_untouched_events_are_byte_identical(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    request = {**HELLO, "stream": True, "return_token_ids": True, "logprobs": True}
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.chat(**request)
        assert answer.content == b"".join(events_of(CHAT, request))
        assert len((await recorded(scripted))[0][0].choices[0].token_ids) == 3


async def test_each_prompt_of_several_is_a_call(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    body = {"model": "tiny", "prompt": [[1, 2], [3, 4]], "n": 2}
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.http.post(rig.base() + COMPLETIONS, json=body)
        assert len(answer.json()["choices"]) == 4
        calls = await recorded(scripted, count=2)
    assert sorted([c.index for c in call.choices] for call, _ in calls) == [[0, 1], [0, 1]]
    first = sorted(call.choices[0].token_ids[0] for call, _ in calls)
    assert first == [11, 211]


async def test_a_conversation_is_stored_as_differences(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    prompts = [list(range(40)), [*range(40), *TOKENS, 50, 51]]

    async def script(request: Any, body: dict[str, Any]) -> Any:
        from aiohttp import web

        answer = answer_of(CHAT, body)
        answer["prompt_token_ids"] = prompts[len(engine.requests) - 1]
        return web.json_response(answer)

    engine.script = script
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        await rig.chat()
        await recorded(scripted, count=1)
        await eventually(lambda: not rig.state()["spool_waiting"], what="delivery")
        await rig.chat()
        calls = await recorded(scripted, count=2)
    assert [prompt for _, prompt in calls] == prompts
    assert scripted.deltas == 1


async def test_other_dialects_pass_byte_identical_and_are_marked(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    paths = ("/v1/responses", "/v1/messages", "/v1/embeddings")
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        for path in paths:
            answer = await rig.http.post(rig.base() + path, json={"model": "tiny", "input": "x"})
            assert answer.json() == {"id": "other-1", "path": path, "x": [1.0, 2]}
        calls = await recorded(scripted, count=3)
        assert (await rig.http.get(rig.base() + "/v1/models")).json()["data"][0]["id"] == "tiny"
        for path in ("/metrics", "/tokenize", "/v1/load_lora_adapter", "/pause", "/agl/interceptor"):
            assert (await rig.http.post(rig.base() + path, json={})).status_code == 404
        assert (await rig.http.post(f"{rig.proxy.url}/pause", json={})).status_code == 404
    assert [body for body in engine.requests if "return_token_ids" in body] == []
    assert {call.untrainable_reason for call, _ in calls} == {
        f"no token ids: from outside {name} does not give them"
        for name in ("responses", "messages", "embeddings")
    }


async def test_images_reach_the_engine_as_they_are(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    image = base64.b64encode(bytes(range(256)) * 400).decode()
    parts = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}", "detail": "low"}},
    ]
    source = {"type": "base64", "media_type": "image/png", "data": image}
    messages = {
        "model": "tiny",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
    }
    bodies: list[bytes] = []

    async def keep(request: Any, body: dict[str, Any]) -> Any:
        from aiohttp import web

        bodies.append(await request.read())
        return web.json_response(answer_of(request.path, body) if "chat" in request.path else {"id": "x"})

    engine.script = keep
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        chat = {**HELLO, "messages": [{"role": "user", "content": parts}]}
        assert (await rig.http.post(rig.base() + CHAT, json=chat)).status_code == 200
        # Indented, as no JSON library would write it again.
        text = json.dumps(messages, indent=3).encode()
        assert (await rig.http.post(rig.base() + "/v1/messages", content=text)).status_code == 200
        calls = await recorded(scripted, count=2)
    assert json.loads(bodies[0])["messages"] == chat["messages"]
    assert bodies[1] == text
    assert from_payload(calls[1][0].raw_request) == messages


async def test_the_base_url_names_agent_and_mode_and_the_temperature_is_imposed_in_training_only(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine, temperature=0.7) as rig:
        await rig.chat(rig.base(more="/agent/planner/notrain"), temperature=0.2, top_p=0.9)
        ((call, _),) = await recorded(scripted)
        await rig.chat(rig.base("ro-2", more="/mode/val"), temperature=0.2)
        ((val, _),) = await recorded(scripted, "ro-2")
    assert [body["temperature"] for body in engine.requests] == [0.7, 0.2]
    assert "top_p" not in engine.requests[1]
    assert call.agent_name == "planner"
    assert call.untrainable_reason == "the agent asked for /notrain; sampled with top_p=0.9"
    assert {each.key: each.value.double_value for each in call.sampling.other} == {
        "requested.temperature": 0.2
    }
    assert call.logprob_semantics == model_call_pb2.LOGPROB_SEMANTICS_UNSPECIFIED
    assert (val.mode, val.sampling.temperature) == ("val", 0.2)


async def test_by_headers_and_without_attribution(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    headers = {
        "x-rollout-id": "ro-9",
        "x-attempt-id": "at-9",
        "x-agl-mode": "val",
        "authorization": "Bearer key",
    }
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.http.post(rig.proxy.url + CHAT, json=HELLO, headers=headers)
        assert answer.status_code == 200
        ((call, _),) = await recorded(scripted, "ro-9")
        plain = await rig.chat(rig.proxy.url)
        assert plain.json() == answer_of(CHAT, HELLO)
        assert rig.state()["unattributed"] == 1
    assert call.mode == "val"
    assert engine.requests[1] == HELLO
    assert "x-rollout-id" not in engine.headers[0]
    assert engine.headers[0]["authorization"] == "Bearer key"
    async with proxy_before(scripted.address, tmp_path, engine, unattributed="refuse") as rig:
        refused = await rig.chat(rig.proxy.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unattributed")


async def test_an_engine_that_knows_no_ids_serves_and_its_calls_are_marked(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    from aiohttp import web

    async def hosted(request: Any, body: dict[str, Any]) -> web.StreamResponse:
        if "return_token_ids" in body:
            return web.json_response({"error": {"message": "unknown: return_token_ids"}}, status=400)
        return web.json_response(answer_of(CHAT, body))

    engine.script = hosted
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        for _ in range(2):
            assert (await rig.chat()).json() == answer_of(CHAT, HELLO)
        calls = await recorded(scripted, count=2)
    assert len(engine.requests) == 3
    assert all("does not know return_token_ids" in call.untrainable_reason for call, _ in calls)


async def test_named_models_go_to_their_engines(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, UpstreamSpec(engine.url, "org/big")) as rig:
        assert (await rig.chat(model="org/big")).status_code == 200
        client = openai.AsyncOpenAI(base_url=rig.base() + "/v1", api_key="none", max_retries=0)
        async with client:
            with pytest.raises(openai.NotFoundError, match="no engine serves model 'small'"):
                await client.chat.completions.create(model="small", messages=HELLO["messages"])
        calls = await recorded(scripted, count=2)
    assert calls[1][0].outcome == model_call_pb2.MODEL_CALL_OUTCOME_ERROR


async def test_the_openai_sdk_streams_and_calls_through_the_proxy(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async def words(rig: Rig) -> str:
        async with openai.AsyncOpenAI(base_url=rig.base() + "/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO["messages"], stream=True, max_tokens=3
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        assert await words(rig) == "one two three"
        ((call, _),) = await recorded(scripted)
    assert call.sampling.max_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("settings", [{}, {"unattributed": "record"}])
async def test_what_a_request_has_held_is_free_once_it_is_served(
    scripted: ScriptedStore,
    engine: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    settings: dict[str, Any],
) -> None:
    """Bodies and answers in cycles would lie in memory until a collector comes that seldom does."""
    # Each request asks the store for its attempt, which that refuses.
    monkeypatch.setattr(attempts, "_AFTER_FAILURE_SECONDS", -1.0)
    async with proxy_before(scripted.address, tmp_path, engine, ack_timeout=30.0, **settings) as rig:
        base = rig.proxy.url if settings else ""
        await rig.chat(base, stream=stream)
        # A machine under load may hold on to an error, as a time-out; a cycle is there each time.
        for _ in range(5):
            if not (found := await _left_by_three(rig, base, stream)):
                break
    assert not found


async def _left_by_three(rig: Rig, base: str, stream: bool) -> set[str]:
    """Names of our types of which something is left to the collector after three requests."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            assert (await rig.chat(base, stream=stream)).status_code == 200
        gc.collect()
        kinds = {type(each) for each in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    return {kind.__qualname__ for kind in kinds if kind.__module__.startswith("agl_grpc.interceptor")}
