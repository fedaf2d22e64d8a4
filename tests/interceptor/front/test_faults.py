"""Bad requests, bad engines, clients that leave: each its own error, and a recorded reason."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from aiohttp import web

from agl_grpc.interceptor.front.settings import UpstreamSpec
from agl_grpc.v1 import model_call_pb2
from tests.interceptor.front.fake_engine import FakeEngine, answer_of, events_of, fake_engine
from tests.interceptor.front.rig import CHAT, HELLO, proxy_before
from tests.interceptor.front.test_capture import recorded
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.waiting import eventually, free_port

CUT = model_call_pb2.MODEL_CALL_OUTCOME_CUT
ERROR = model_call_pb2.MODEL_CALL_OUTCOME_ERROR
Script = Callable[[web.BaseRequest, dict[str, Any]], Awaitable[web.StreamResponse]]


async def test_bad_requests_are_refused_in_the_dialects_shape_and_recorded(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine, max_body=1000) as rig:
        url = rig.base() + CHAT
        answers = [await rig.http.post(url, content=body) for body in (b'{"model": ', b"[1]", b"x" * 5000)]
        said = [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]
        assert said == [(400, "invalid_json"), (400, "invalid_json"), (413, "request_too_large")]
        assert all(answer.headers["x-should-retry"] == "false" for answer in answers)
        anthropic = (await rig.http.post(rig.base() + "/v1/messages", content=b"{")).json()
        assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "invalid_request_error")
        calls = await recorded(scripted, count=4)
    assert not engine.requests
    assert {call.outcome for call, _ in calls} == {ERROR}
    reasons = [span.status.message for span, _ in scripted.calls_of("ro-1")]
    assert "is not JSON" in reasons[0]
    assert "more than 1000 bytes" in reasons[2]


async def test_more_prompts_than_are_recorded_and_defects_are_refused(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        body = {"model": "tiny", "prompt": ["x"] * 1001}
        many = await rig.http.post(rig.base() + "/v1/completions", json=body)
        assert (many.status_code, many.json()["error"]["code"]) == (400, "too_many_prompts")

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("agl_grpc.interceptor.front.dialects.Collector.take", broken)
        defect = await rig.chat()
        assert (defect.status_code, defect.json()["error"]["code"]) == (500, "internal")
        calls = await recorded(scripted, count=2)
        await eventually(lambda: not scripted.open_calls, what="the call is closed")
    assert {call.outcome for call, _ in calls} == {ERROR}


async def garbage(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b"<html>", content_type="application/json")


async def no_choices(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"hello": 1})


async def nothing(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def no_http(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"this is no HTTP\r\n\r\n")  # type: ignore[attr-defined]  # a plain transport
    request.transport.abort()
    return web.Response()


async def half_a_body(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-length": "1000", "content-type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.mark.parametrize("script", [garbage, no_choices, nothing, no_http, half_a_body])
async def test_an_engine_that_answers_rubbish_is_a_502_and_a_recorded_error(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path, script: Script
) -> None:
    engine.script = script
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")
        assert "Traceback" not in answer.text
        ((call, _),) = await recorded(scripted)
    ((span, _),) = scripted.calls_of("ro-1")
    assert call.outcome == ERROR
    assert span.status.message == answer.json()["error"]["message"]


async def send_events(request: web.BaseRequest, events: list[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(event)
    return response


async def read_words(stream: Any, words: list[str]) -> None:
    """Into `words`, which keeps what came when the stream breaks."""
    async for chunk in stream:
        words += [chunk.choices[0].delta.content or ""]


async def half_an_event(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    events = events_of(request.path, body)
    return await send_events(request, [*events[:2], events[2][:20]])


async def event_garbage(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    return await send_events(request, [*events_of(request.path, body)[:2], b"data: <oops>\n\n"])


async def early_end(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    return await send_events(request, events_of(request.path, body)[:2])


async def connection_lost(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    response = await send_events(request, events_of(request.path, body)[:2])
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.mark.parametrize("script", [half_an_event, event_garbage, early_end, connection_lost])
async def test_a_stream_that_breaks_ends_as_an_error_and_what_came_is_recorded_as_cut(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path, script: Script
) -> None:
    engine.script = script
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        async with openai.AsyncOpenAI(base_url=rig.base() + "/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO["messages"], stream=True
            )
            words: list[str] = []
            with pytest.raises(openai.APIError, match="the engine"):
                await read_words(stream, words)
        ((call, _),) = await recorded(scripted)
    ((span, _),) = scripted.calls_of("ro-1")
    assert "".join(words) == "one "
    assert call.outcome == CUT
    assert list(call.choices[0].token_ids) == [11]
    assert "the engine" in span.status.message


async def test_a_stream_in_odd_pieces_is_the_same_stream(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async def pieces(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        data = b": a comment\n\n" + b"".join(events_of(request.path, body)).replace(b"\n\n", b"\r\n\r\n")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for start in range(0, len(data), 7):
            await response.write(data[start : start + 7])
            await asyncio.sleep(0)
        return response

    engine.script = pieces
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        answer = await rig.chat(stream=True)
        ((call, _),) = await recorded(scripted)
    assert answer.text.startswith(": a comment\n\n")
    assert answer.text.count("\r\n\r\n") == 4
    assert answer.text.endswith("data: [DONE]\r\n\r\n")
    assert len(call.choices[0].token_ids) == 3


async def test_ids_and_logprobs_of_different_length_are_marked(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    wrong = [
        {"token_ids": [1, 2]},
        {"token_ids": ["a", "b", "c"]},
        {"token_ids": [1, -2, 3]},
        {"logprobs": {"content": [{"logprob": None}] * 3}},
        {"logprobs": {"content": 7}},
    ]

    async def script(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        answer = answer_of(request.path, body)
        answer["choices"][0].update(wrong[len(engine.requests) - 1])
        return web.json_response(answer)

    engine.script = script
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        for _ in wrong:
            assert (await rig.chat()).json() == answer_of(CHAT, HELLO)
        calls = await recorded(scripted, count=len(wrong))
        assert rig.state()["rejected"] == 0
    reasons = [call.untrainable_reason for call, _ in calls]
    assert "2 token ids and 3 logprobs" in reasons[0]
    assert all("token ids that are none" in reason for reason in reasons[1:3])
    assert all("logprobs that are no numbers" in reason for reason in reasons[3:])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_engine_and_its_retry_names_the_orphan(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path, stream: bool
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        engine.gate.clear()
        body = {**HELLO, "stream": stream}
        call = asyncio.create_task(rig.http.post(rig.base() + CHAT, json=body))
        await eventually(lambda: engine.requests, what="the request")
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await asyncio.wait_for(engine.cut.wait(), 10)
        ((cut, _),) = await recorded(scripted)
        engine.gate.set()
        again = await rig.http.post(rig.base() + CHAT, json=body, headers={"x-stainless-retry-count": "1"})
        assert again.status_code == 200
        calls = await recorded(scripted, count=2)
    (first, _), (second, _) = scripted.calls_of("ro-1")
    assert cut.outcome == CUT
    assert "the client went away" in first.status.message
    assert second.model_call.retry_of == first.span_id
    assert calls[1][0].untrainable_reason == ""


async def test_an_answer_lost_on_its_way_makes_an_orphan_of_its_call(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    """The SDK itself asks again after its time-out; the first answer was complete and never arrived."""
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        lost = True

        async def losing(request: httpx.Request) -> None:
            nonlocal lost
            answer = await rig.http.send(
                httpx.Request("POST", request.url, headers=request.headers, content=request.content)
            )
            assert answer.status_code == 200
            if lost:
                lost = False
                raise httpx.ReadTimeout("lost on the way", request=request)

        transport = httpx.AsyncHTTPTransport()
        async with httpx.AsyncClient(transport=transport, event_hooks={"request": [losing]}) as http:
            client = openai.AsyncOpenAI(base_url=rig.base() + "/v1", api_key="x", http_client=http)
            await client.chat.completions.create(model="tiny", messages=HELLO["messages"], seed=7)
        calls = [span for span, _ in scripted.calls_of("ro-1")]
        await eventually(lambda: len(scripted.calls_of("ro-1")) >= 2, what="both calls")
        calls = [span for span, _ in scripted.calls_of("ro-1")]
    assert calls[1].model_call.retry_of == calls[0].span_id


async def test_eight_equal_parallel_prompts_are_eight_samples(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        await asyncio.gather(*(rig.chat() for _ in range(8)))
        calls = await recorded(scripted, count=8)
    assert {call.retry_of for call, _ in calls} == {b""}
    assert {call.untrainable_reason for call, _ in calls} == {""}


async def test_requests_go_to_another_engine_before_the_first_byte_only(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with fake_engine() as other:
        dead = UpstreamSpec(f"http://127.0.0.1:{free_port()}")
        async with proxy_before(scripted.address, tmp_path, dead, engine, other) as rig:
            for number in range(12):
                assert (await rig.chat(rig.base(f"ro-{number}"))).status_code == 200
            served = {number for number, each in enumerate((engine, other)) if each.requests}
            assert served == {0, 1}
            before = len(engine.requests) + len(other.requests)

            async def busy(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
                return web.json_response({"error": {"message": "busy"}}, status=503)

            engine.script = busy
            for number in range(12):
                assert (await rig.chat(rig.base(f"ro-{number}"))).status_code == 200
            engine.script = connection_lost
            broken = [await rig.chat(rig.base(f"ro-{number}"), stream=True) for number in range(12)]
            asked = len(engine.requests) + len(other.requests) - before
    assert any("broke off" in answer.text for answer in broken)
    assert asked < 12 + 12 + 12 + 12


async def test_a_rollout_stays_with_its_engine_and_a_draining_one_gets_no_new_ones(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with fake_engine() as other, proxy_before(scripted.address, tmp_path, engine, other) as rig:
        for _ in range(6):
            await rig.chat(rig.base("ro-same"))
        assert sorted((len(engine.requests), len(other.requests))) == [0, 6]
        rig.proxy.set_upstreams([UpstreamSpec(engine.url, draining=True), UpstreamSpec(other.url)])
        before = len(engine.requests)
        for number in range(12):
            await rig.chat(rig.base(f"ro-{number}"))
        assert len(engine.requests) == before
        rig.proxy.set_upstreams([UpstreamSpec(engine.url)])
        assert (await rig.chat()).status_code == 200
        assert [each["url"] for each in rig.state()["upstreams"]] == [engine.url]


async def test_no_engine_is_a_503_that_may_be_tried_again(scripted: ScriptedStore, tmp_path: Path) -> None:
    dead = UpstreamSpec(f"http://127.0.0.1:{free_port()}")
    async with proxy_before(scripted.address, tmp_path, dead) as rig:
        answer = await rig.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        await eventually(
            lambda: not rig.state()["upstreams"][0]["healthy"], what="the engine is found to be down"
        )
        assert (await rig.http.get(f"{rig.proxy.url}/health")).status_code == 503


async def test_an_engine_that_is_too_slow_is_a_504(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    engine.gate.clear()
    async with proxy_before(scripted.address, tmp_path, engine, read_timeout=0.2) as rig:
        answer = await rig.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        engine.gate.set()


async def test_limits_of_a_rollout(scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path) -> None:
    limits = {"max_calls": 3, "max_tokens": 20, "max_concurrency": 1}
    async with proxy_before(scripted.address, tmp_path, engine, **limits) as rig:
        engine.gate.clear()
        first = asyncio.create_task(rig.chat())
        await eventually(lambda: engine.requests, what="the first call")
        second = await rig.chat()
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rollout_concurrency")
        assert "retry-after" in second.headers
        engine.gate.set()
        assert (await first).status_code == 200
        assert [(await rig.chat()).status_code for _ in range(3)] == [200, 200, 429]
        third = await rig.chat(rig.base("ro-2"), n=3)
        assert third.status_code == 200
        refusals = [await rig.chat(rig.base("ro-2")) for _ in range(3)]
        assert [answer.status_code for answer in refusals] == [200, 200, 429]
        assert refusals[-1].json()["error"]["code"] == "rollout_limit"
        assert refusals[-1].headers["x-should-retry"] == "false"
        assert rig.state()["refusals"] == {"rollout_concurrency": 1, "rollout_limit": 2}


async def test_too_many_at_once_are_refused(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    engine.gate.clear()
    async with proxy_before(scripted.address, tmp_path, engine, max_in_flight=2) as rig:
        calls = [asyncio.create_task(rig.chat(rig.base(f"ro-{number}"))) for number in range(5)]
        done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 3:
            more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert {call.result().status_code for call in done} == {503}
        engine.gate.set()
        assert {(await call).status_code for call in pending} == {200}
