"""What a real vLLM samples is what the store gets, for every API, streaming or not."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import httpx
import pytest

from agl_grpc.model.value import RawPayload, from_payload
from agl_grpc.v1 import model_call_pb2, span_pb2
from tests.interceptor.engine import Engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.torch_client import TorchClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

HELLO = [{"role": "user", "content": "hello world"}]
IDS: dict[str, Any] = {"return_token_ids": True}


def sse(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream."""
    lines = (line[6:] for line in response.text.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


def recorded(store: ScriptedStore, rollout: str, calls: int = 1) -> list[tuple[span_pb2.Span, list[int]]]:
    return store.wait(
        lambda: found if len(found := store.calls_of(rollout)) >= calls else None,
        f"{calls} calls of {rollout}",
    )


def choice_of(span: span_pb2.Span, index: int = 0) -> model_call_pb2.Choice:
    return next(c for c in span.model_call.choices if c.index == index)


def test_chat_ids_and_logprobs_are_vllms_own(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "logprobs": True, "top_logprobs": 0, **IDS}
    answer = http.post(f"{running.base('chat')}/v1/chat/completions", json=body).json()
    # The answer had come whole before the test looks: it must be in the store already.
    ((span, prompt),) = store.calls_of("chat")
    assert prompt == answer["prompt_token_ids"]
    choice = choice_of(span)
    assert list(choice.token_ids) == answer["choices"][0]["token_ids"]
    theirs = [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]
    assert choice.logprobs == pytest.approx(theirs, abs=1e-6)
    assert choice.finish_reason == answer["choices"][0]["finish_reason"]
    assert [(r.start, r.end, r.policy_version) for r in choice.policy_runs] == [(0, len(theirs), 0)]
    call = span.model_call
    assert (call.api, call.model, call.engine_id, call.mode) == (
        "chat.completions",
        "tiny",
        "engine-1",
        "train",
    )
    assert call.untrainable_reason == ""
    assert call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
    assert call.logprob_semantics == model_call_pb2.LOGPROB_SEMANTICS_PROCESSED
    assert call.timings.total_ns >= call.timings.first_token_ns > 0
    assert answer["id"] == call.request_id
    # Who does not ask for token ids gets vLLM's own answer, in which they are null.
    unasked = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    plain = http.post(f"{running.url}/v1/chat/completions", json=unasked).json()
    assert plain["prompt_token_ids"] is plain["choices"][0]["token_ids"] is None


def test_chat_stream(running: Engine, store: ScriptedStore, http: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 20,
        "stream": True,
        "logprobs": True,
        "n": 2,
        "cache_salt": "of this chat",
        **IDS,
    }
    response = http.post(f"{running.base('chat-stream')}/v1/chat/completions", json=body)
    ((span, prompt),) = store.calls_of("chat-stream")
    assert span.model_call.cache_salt == "of this chat"
    ids: dict[int, list[int]] = {0: [], 1: []}
    logprobs: dict[int, list[float]] = {0: [], 1: []}
    for event in sse(response):
        if event.get("prompt_token_ids"):
            assert event["prompt_token_ids"] == prompt
        for choice in event["choices"]:
            ids[choice["index"]] += choice.get("token_ids") or []
            logprobs[choice["index"]] += [
                e["logprob"] for e in (choice.get("logprobs") or {}).get("content") or []
            ]
    assert len(ids[0]) > 1
    for index in (0, 1):
        assert list(choice_of(span, index).token_ids) == ids[index]
        assert choice_of(span, index).logprobs == pytest.approx(logprobs[index], abs=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_completions(running: Engine, store: ScriptedStore, http: httpx.Client, stream: bool) -> None:
    rollout = f"completions-{stream}"
    body = {
        "model": "tiny",
        "prompt": ["hello", "red fox"],
        "max_tokens": 12,
        "n": 2,
        "logprobs": 0,
        "stream": stream,
    }
    response = http.post(f"{running.base(rollout)}/v1/completions", json={**body, **IDS})
    seen: dict[int, tuple[list[int], list[float]]] = {}
    prompts: dict[int, list[int]] = {}
    for event in sse(response) if stream else [response.json()]:
        for choice in event["choices"]:
            ids, logprobs = seen.setdefault(choice["index"], ([], []))
            ids += choice["token_ids"] or []
            logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
            if choice.get("prompt_token_ids"):
                prompts[choice["index"]] = choice["prompt_token_ids"]
    found = store.calls_of(rollout)
    assert len(found) == 2
    captured = sorted(
        (prompt, list(choice.token_ids), list(choice.logprobs))
        for span, prompt in found
        for choice in span.model_call.choices
    )
    theirs = sorted((prompts[i - i % 2], ids, logprobs) for i, (ids, logprobs) in seen.items())
    assert [c[:2] for c in captured] == [t[:2] for t in theirs]
    for (_, _, ours), (_, _, expected) in zip(captured, theirs, strict=True):
        assert ours == pytest.approx(expected, abs=1e-6)


def test_generate_with_its_own_version_spans(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {"token_ids": [1, 5, 9, 20, 31], "sampling_params": {"max_tokens": 9, "logprobs": 0}}
    answer = http.post(f"{running.base('generate')}/inference/v1/generate", json=body).json()["choices"][0]
    ((span, prompt),) = store.calls_of("generate")
    assert prompt == [1, 5, 9, 20, 31]
    assert list(choice_of(span).token_ids) == answer["token_ids"]
    runs = [(str(r.policy_version), r.start, r.end) for r in choice_of(span).policy_runs]
    assert runs == [(v["version"], v["start"], v["end"]) for v in answer["weight_versions"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("responses", {"input": "hello world", "max_output_tokens": 15, "temperature": 1.0}),
        ("messages", {"messages": HELLO, "max_tokens": 15}),
    ],
)
def test_dialects_without_token_ids_match_a_recomputation(
    running: Engine,
    store: ScriptedStore,
    torch_client: TorchClient,
    http: httpx.Client,
    path: str,
    body: dict[str, Any],
    stream: bool,
) -> None:
    rollout = f"{path}-{stream}"
    response = http.post(
        f"{running.base(rollout)}/v1/{path}", json={"model": "tiny", "stream": stream, **body}
    )
    assert response.status_code == 200, response.text
    ((span, prompt),) = store.calls_of(rollout)
    choice = choice_of(span)
    chat = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **IDS}
    assert prompt == http.post(f"{running.url}/v1/chat/completions", json=chat).json()["prompt_token_ids"]
    rows = [{"prompt": prompt, "response": list(choice.token_ids)}]
    (expected,) = recompute(torch_client, running, rows)
    assert list(choice.logprobs) == pytest.approx(expected, abs=1e-4)
    assert span.model_call.api == path


def recompute(client: TorchClient, running: Engine, rows: list[dict[str, Any]]) -> list[list[float]]:
    answer: list[list[float]] = client.call("logprobs", model=str(running.model), rows=rows)
    return answer


def test_logprobs_are_those_of_the_sampled_distribution(
    running: Engine, store: ScriptedStore, torch_client: TorchClient, http: httpx.Client
) -> None:
    rows = []
    for number, temperature in enumerate([1.0, 0.5, 1.7]):
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": temperature}
        http.post(f"{running.base(f'temperature-{number}')}/v1/chat/completions", json=body)
        ((span, prompt),) = store.calls_of(f"temperature-{number}")
        assert span.model_call.sampling.temperature == temperature
        rows.append(
            {"prompt": prompt, "response": list(choice_of(span).token_ids), "temperature": temperature}
        )
        rows[-1]["ours"] = list(choice_of(span).logprobs)
    for row, expected in zip(rows, recompute(torch_client, running, rows), strict=True):
        assert row["ours"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"temperature": 0}, "greedy (temperature=0)"),
        ({"top_p": 0.5}, "sampled with top_p=0.5"),
        ({"top_k": 5}, "sampled with top_k=5"),
        ({"logit_bias": {"5": 3}}, "sampled with logit_bias={5: 3.0}"),
        (
            {"repetition_penalty": 1.3, "min_p": 0.1},
            "sampled with min_p=0.1; sampled with repetition_penalty=1.3",
        ),
        ({"bad_words": ["hello"]}, "sampled with bad_words=['hello']"),
    ],
)
def test_untrainable_sampling_is_served_and_named(
    running: Engine, store: ScriptedStore, http: httpx.Client, parameters: dict[str, Any], reason: str
) -> None:
    rollout = f"untrainable-{'-'.join(parameters)}"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **parameters}
    assert http.post(f"{running.base(rollout)}/v1/chat/completions", json=body).status_code == 200
    ((span, _),) = store.calls_of(rollout)
    assert span.model_call.untrainable_reason == reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_bytes_are_the_same_with_and_without_capture(
    running: Engine, http: httpx.Client, path: str, stream: bool
) -> None:
    prompt = {
        "chat/completions": {"messages": HELLO, "max_tokens": 16, "seed": 7},
        "completions": {"prompt": "hello world", "max_tokens": 16, "seed": 7, "n": 2},
        "responses": {"input": "hello world", "max_output_tokens": 16, "temperature": 0},
        "messages": {"messages": HELLO, "max_tokens": 16, "temperature": 0},
    }[path]
    body = {"model": "tiny", "stream": stream, **prompt}
    # How many tokens share an event depends on the engine's pace: two streams are compared until they cut
    # alike.
    for _ in range(80 if stream else 1):
        plain = http.post(f"{running.url}/v1/{path}", json=body)
        captured = http.post(f"{running.base('bytes')}/v1/{path}", json=body)
        assert plain.status_code == captured.status_code == 200
        assert set(plain.headers) == set(captured.headers)
        if settled(plain) == settled(captured):
            return
    assert settled(plain) == settled(captured)


def settled(response: httpx.Response) -> str:
    """The answer's text with ids and clock times, which differ between any two answers, made equal."""
    text = response.text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [
        response.json()
    ]
    for value in {v for event in events for v in volatile(event)}:
        text = text.replace(value, "VOLATILE")
    return text


def volatile(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for name, each in value.items() for found in volatile(each, name)]
    if isinstance(value, list):
        return [found for each in value for found in volatile(each, key)]
    clock = key.endswith("_at") or key == "created"
    named = key.endswith("id") and isinstance(value, str) and len(value) > 8
    return [json.dumps(value)] if value and (clock or named) else []


def test_a_growing_conversation_is_stored_as_deltas(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    before = store.deltas
    ids = [1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]
    for _ in range(3):
        body = {"token_ids": ids, "sampling_params": {"max_tokens": 10, "ignore_eos": True}}
        answer = http.post(f"{running.base('deltas')}/inference/v1/generate", json=body).json()
        ids = ids + answer["choices"][0]["token_ids"] + [60, 61]
    calls = store.calls_of("deltas")
    assert store.deltas == before + 2
    assert [len(prompt) for _, prompt in calls] == [12, 24, 36]
    assert calls[2][1] == ids[:36]
    assert list(calls[2][0].model_call.prompt.token_ids) == [60, 61]
    # A store that has lost the base gets the prompt whole.
    store.forgetful = True
    try:
        http.post(
            f"{running.base('deltas')}/inference/v1/generate", json={"token_ids": ids, "sampling_params": {}}
        )
    finally:
        store.forgetful = False
    assert store.calls_of("deltas")[3][1] == ids


def test_a_call_is_announced_before_it_ends(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
    http.post(f"{running.base('announced')}/v1/chat/completions", json=body)
    ((span, _),) = store.calls_of("announced")
    announced = store.request_with(lambda g: any(c.span_id == span.span_id for c in g.open_calls))
    ended = store.request_with(lambda g: any(s.span_id == span.span_id for s in g.spans))
    assert announced < ended
    assert ("announced", "at-1") not in store.open_calls.values()


@pytest.mark.parametrize("stream", [False, True])
def test_request_and_answer_are_kept_as_they_came_and_went(
    running: Engine, store: ScriptedStore, http: httpx.Client, stream: bool
) -> None:
    rollout = f"raw-{stream}"
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 40, "stream": stream}).encode()
    url = f"{running.base(rollout)}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    first = http.post(url, content=body, headers=headers)
    again = http.post(url, content=body, headers={**headers, "x-stainless-retry-count": "1"})
    alike = http.post(url, content=body, headers=headers)
    spans = [span for span, _ in recorded(store, rollout, 3)]
    for answer, span in zip((first, again, alike), spans, strict=True):
        call = span.model_call
        assert from_payload(call.raw_request) == json.loads(body)
        media_type = answer.headers["content-type"].split(";")[0]
        kept = from_payload(call.raw_response)
        assert kept == (RawPayload(media_type, answer.content) if stream else answer.json())
    # The client has said that the first answer never reached it; an equal request alone is a sample.
    assert [span.model_call.retry_of for span in spans] == [b"", spans[0].span_id, b""]


def leave_without_answer(running: Engine, store: ScriptedStore, rollout: str, body: dict[str, Any]) -> None:
    """Send a request, and hang up a moment after the engine has begun with it."""
    url = httpx.URL(f"{running.base(rollout)}/v1/completions")
    connection = http.client.HTTPConnection(str(url.host), url.port)
    connection.request("POST", url.path, json.dumps(body), {"Content-Type": "application/json"})
    store.wait(lambda: (rollout, "at-1") in store.open_calls.values(), "the open call")
    time.sleep(0.5)  # for some tokens, which nothing outside can see
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cuts_the_call(
    running: Engine, store: ScriptedStore, torch_client: TorchClient, stream: bool
) -> None:
    rollout = f"cut-{stream}"
    body = {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 450,
        "ignore_eos": True,
        "n": 2,
        "stream": stream,
    }
    url = f"{running.base(rollout)}/v1/completions"
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", url, json=body, timeout=60) as response:
                for _ in zip(range(20), response.iter_lines(), strict=False):
                    pass
        else:
            leave_without_answer(running, store, rollout, body)
    ((span, prompt),) = recorded(store, rollout)
    assert span.model_call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_CUT
    for index in (0, 1):
        choice = choice_of(span, index)
        assert 1 <= len(choice.token_ids) == len(choice.logprobs) < 450
        assert choice.finish_reason == "abort"
        assert [(r.start, r.end) for r in choice.policy_runs] == [(0, len(choice.token_ids))]
    rows = [{"prompt": prompt, "response": list(choice_of(span, i).token_ids)} for i in (0, 1)]
    for index, expected in enumerate(recompute(torch_client, running, rows)):
        assert list(choice_of(span, index).logprobs) == pytest.approx(expected, abs=1e-4)


def test_only_inference_paths_exist_under_an_attempt(running: Engine, http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/messages/count_tokens"):
        method = http.get if path == "/v1/models" else http.post
        answer = method(
            running.base("paths") + path,
            **({} if method == http.get else {"json": {"model": "tiny", "messages": HELLO}}),
        )
        assert answer.status_code == 200, answer.text
    for path in (
        "/metrics",
        "/v1/load_lora_adapter",
        "/tokenize",
        "/agl/interceptor",
        "/rollout/a/attempt/b/v1/models",
    ):
        assert http.get(running.base("paths") + path).status_code == 404, path
    assert http.get(f"{running.url}/rollout/only-half/v1/models").status_code == 404
    for path in ("/pause", "/resume", "/collective_rpc", "/update_weights"):
        assert http.post(running.url + path, json={}).status_code == 404, f"dev mode is on: {path}"


def test_base_urls_with_agent_mode_and_notrain(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    base = running.base("segments", "at%2F9")
    assert (
        http.post(f"{base}/agent/planner/mode/val/notrain/v1/chat/completions", json=body).status_code == 200
    )
    ((span, _),) = store.calls_of("segments")
    assert ("segments", "at/9", bytes(span.span_id)) in store.spans
    assert (span.model_call.agent_name, span.model_call.mode) == ("planner", "val")
    assert span.model_call.untrainable_reason == "the agent asked for /notrain"


def test_beam_search_is_refused_in_train_mode_and_one_record_elsewhere(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "n": 2, "use_beam_search": True}
    answer = http.post(f"{running.base('beam')}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "beam search cannot be trained" in answer.text
    found = http.post(f"{running.base('beam')}/mode/val/v1/chat/completions", json={**body, **IDS})
    assert found.status_code == 200
    refused, (span, prompt) = store.calls_of("beam")
    assert refused[0].status.message.startswith("400: ")
    call = span.model_call
    assert prompt == found.json()["prompt_token_ids"]
    assert call.request_id == found.json()["id"]
    assert from_payload(call.raw_response) == found.json()
    assert call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
    assert call.untrainable_reason.startswith("beam search")
    assert ("beam", "at-1") not in store.open_calls.values()


def test_a_refused_request_leaves_no_open_call(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    body = {
        "model": "tiny",
        "prompt": [[1, 2, 3]],
        "max_tokens": 4,
        "min_tokens": 2,
        "stop_token_ids": [999999999],
    }
    assert http.post(f"{running.base('refused')}/v1/completions", json=body).status_code >= 400
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    http.post(f"{running.base('after-refused')}/v1/chat/completions", json=body)
    store.wait(lambda: ("refused", "at-1") not in store.open_calls.values(), "no open call is left")
    ((span, _),) = store.calls_of("refused")
    assert span.model_call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_ERROR
    assert "stop_token_ids" in span.status.message


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@pytest.mark.parametrize("path", PATHS)
def test_bad_requests_get_their_dialects_shape_and_a_recorded_reason(
    running: Engine, store: ScriptedStore, http: httpx.Client, path: str
) -> None:
    rollout = f"bad{path.replace('/', '-')}"
    good: dict[str, Any] = {"model": "tiny", "messages": HELLO, "prompt": "hello", "input": "hello"}
    for content in (b'{"model":', b"[1]", json.dumps({**good, "model": "nobody", "max_tokens": 3}).encode()):
        answer = http.post(
            f"{running.base(rollout)}{path}", content=content, headers={"content-type": "application/json"}
        )
        assert 400 <= answer.status_code < 500, (content, answer.text)
        error = answer.json()["error"]
        assert error["message"]
        assert (answer.json().get("type") == "error") == (path == "/v1/messages")
    calls = store.calls_of(rollout)
    assert len(calls) == 3
    for span, _ in calls:
        assert span.model_call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_ERROR
        assert span.status.message.startswith("4")
