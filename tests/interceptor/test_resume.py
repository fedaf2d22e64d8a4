"""Aborts by the engine, as trainers cause them at weight updates, never reach an agent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agl_grpc.interceptor.settings import Settings
from agl_grpc.v1 import model_call_pb2, span_pb2
from agl_grpc.weights.extension import EXTENSION
from tests.interceptor.engine import Engine, foreign_engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.torch_client import TorchClient

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(600)]

HELLO = [{"role": "user", "content": "hello world"}]
TOKENS = 240
ABORTS = 5
RESUME_SECONDS = 20.0


@pytest.fixture(scope="module", params=["auto", "class"])
def loader(request: pytest.FixtureRequest) -> str:
    """How the interceptor comes into vLLM: by its endpoint plugin, or by the class of its engine client."""
    return str(request.param)


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, store: ScriptedStore, tmp_path_factory: pytest.TempPathFactory, loader: str
) -> Iterator[Engine]:
    """A server put together as verl does it, with vLLM's dev mode on, so that the test can do as a trainer
    does in its process.
    """
    folder = tmp_path_factory.mktemp(f"trained-{loader}")
    settings = Settings(
        store=store.address,
        run_id="run-1",
        engine_id="engine-1",
        spool_dir=str(folder / "spool"),
        resume_timeout=RESUME_SECONDS,
        loader=loader,
    )
    train = ("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs")
    options = (*train, "--max-num-seqs", "64", "--worker-extension-cls", EXTENSION)
    dev_mode = {"VLLM_SERVER_DEV_MODE": "1"}
    with foreign_engine(tiny_model, settings, folder, *options, environment=dev_mode) as started:
        yield started


class Agent(threading.Thread):
    """Streams one chat answer."""

    def __init__(self, running: Engine, rollout: str, on_event: Callable[[], None]) -> None:
        super().__init__(name=rollout)
        self.rollout = rollout
        self._url = f"{running.base(rollout)}/v1/chat/completions"
        self._on_event = on_event
        self.text = ""
        self.ids: list[int] = []
        self.reasons: list[str] = []
        self.completion_tokens = 0
        self.problem = ""

    def run(self) -> None:
        body = {
            "model": "tiny", "messages": HELLO, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
            "return_token_ids": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with httpx.stream("POST", self._url, json=body, timeout=300) as response:
            rest = b""
            # By hand: httpx also breaks lines at characters that may stand in an event's text.
            for piece in response.iter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line[6:]))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.problem = str(event["error"])
        for choice in event.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.ids += choice.get("token_ids") or []
            self.reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        self.completion_tokens = (event.get("usage") or {}).get("completion_tokens", 0)
        self._on_event()


def control(running: Engine, path: str, **body: Any) -> None:
    httpx.post(f"{running.url}{path}", json=body, timeout=120).raise_for_status()


def update_weights(running: Engine, version: int) -> None:
    """What a colocated trainer does, without new weights: everything is aborted and cached state dropped."""
    control(running, "/pause?mode=abort&clear_cache=true")
    control(running, "/update_weight_version", new_version=str(version))
    control(running, "/resume")


def counters(running: Engine) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{running.url}/agl/interceptor", timeout=30).json()
    return found


def call_of(store: ScriptedStore, rollout: str) -> tuple[span_pb2.Span, list[int]]:
    (found,) = store.wait(lambda: store.calls_of(rollout), f"the call of {rollout}")
    return found


def test_answers_go_on_through_five_weight_updates(
    trained: Engine, store: ScriptedStore, torch_client: TorchClient, loader: str
) -> None:
    progress = threading.Condition()

    def on_event() -> None:
        with progress:
            progress.notify_all()

    agents = [Agent(trained, f"through-{loader}-{n}", on_event) for n in range(32)]
    plain: dict[str, Any] = {}
    whole = threading.Thread(target=lambda: plain.update(ask_whole(trained, f"whole-{loader}")))
    for thread in (*agents, whole):
        thread.start()
    first = counters(trained)["policy_version"] + 1
    for number in range(ABORTS):
        with progress:
            # Of all tokens together: a busy engine lets some answers run far ahead of others.
            wanted = len(agents) * (number + 1) * TOKENS // (ABORTS + 2)
            assert progress.wait_for(lambda wanted=wanted: sum(len(a.ids) for a in agents) >= wanted, 120)
        update_weights(trained, first + number)
    for thread in (*agents, whole):
        thread.join()
    assert counters(trained)["resumed"] >= 32
    rows = [check_record(store, agent, first) for agent in agents]
    assert sum(len(row["versions"]) for row in rows) > 32 * 3
    check_whole(store, f"whole-{loader}", plain)
    for row, text in zip(rows, torch_client.call("text", model=str(trained.model), rows=rows), strict=True):
        assert row["text"] == text
    logprobs = torch_client.call("logprobs", model=str(trained.model), rows=rows)
    for row, expected in zip(rows, logprobs, strict=True):
        assert row["ours"] == pytest.approx(expected, abs=1e-4)


def ask_whole(running: Engine, rollout: str) -> dict[str, Any]:
    """An answer without streaming, of two choices with a stop string that never comes."""
    body = {
        "model": "tiny", "prompt": "hello", "max_tokens": TOKENS, "ignore_eos": True, "n": 2,
        "stop": ["no such text"], "return_token_ids": True,
    }  # fmt: skip
    found: dict[str, Any] = httpx.post(
        f"{running.base(rollout)}/v1/completions", json=body, timeout=300
    ).json()
    return found


def check_record(store: ScriptedStore, agent: Agent, first: int) -> dict[str, Any]:
    """The agent's answer is whole, and is what was recorded; a row for recomputation."""
    assert agent.problem == ""
    assert agent.reasons == ["length"]
    assert len(agent.ids) == agent.completion_tokens == TOKENS
    span, prompt = call_of(store, agent.rollout)
    call = span.model_call
    assert (call.outcome, call.untrainable_reason) == (model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE, "")
    (choice,) = call.choices
    assert list(choice.token_ids) == agent.ids
    assert choice.finish_reason == "length"
    versions = [run.policy_version for run in choice.policy_runs]
    assert versions == sorted(set(versions))
    assert set(versions) <= {first - 1, *range(first, first + ABORTS)}
    assert [run.start for run in choice.policy_runs][1:] == [run.end for run in choice.policy_runs][:-1]
    assert (choice.policy_runs[0].start, choice.policy_runs[-1].end) == (0, TOKENS)
    row = {"prompt": prompt, "response": agent.ids, "text": agent.text, "versions": versions}
    return {**row, "ours": list(choice.logprobs)}


def check_whole(store: ScriptedStore, rollout: str, answer: dict[str, Any]) -> None:
    span, _ = call_of(store, rollout)
    theirs = {c["index"]: (c["token_ids"], c["finish_reason"]) for c in answer["choices"]}
    ours = {c.index: (list(c.token_ids), c.finish_reason) for c in span.model_call.choices}
    assert theirs == ours
    assert [len(ids) for ids, _ in ours.values()] == [TOKENS, TOKENS]
    assert answer["usage"]["completion_tokens"] == 2 * TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_go_on_ends_as_an_error(
    trained: Engine, store: ScriptedStore, stream: bool, loader: str
) -> None:
    rollout = f"penalised-{loader}-{stream}"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    answer = abort_in_the_middle(trained, store, rollout, {**body, "presence_penalty": 0.5})
    assert "cannot continue it: it uses presence_penalty" in answer.text
    assert answer.status_code == (200 if stream else 503)
    check_cut(store, rollout, "it uses presence_penalty")


def abort_in_the_middle(
    running: Engine, store: ScriptedStore, rollout: str, body: dict[str, Any], *, resume: bool = True
) -> httpx.Response:
    """The answer to a request whose sequence is aborted once it has begun; the engine resumes, or not."""
    answers: list[httpx.Response] = []
    url = f"{running.base(rollout)}/v1/chat/completions"
    agent = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=300)))
    before = running.generated()
    agent.start()
    store.wait(lambda: (rollout, "at-1") in store.open_calls.values(), "the open call")
    store.wait(lambda: running.generated() > before + 5, "some tokens")
    control(running, "/pause?mode=abort")
    if resume:
        control(running, "/resume")
    agent.join()
    return answers[0]


def check_cut(store: ScriptedStore, rollout: str, why: str) -> None:
    span, _ = call_of(store, rollout)
    assert span.model_call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_CUT
    assert why in span.status.message
    (choice,) = span.model_call.choices
    assert 1 <= len(choice.token_ids) == len(choice.logprobs) < 400


def test_an_engine_that_never_resumes_fails_the_answer(
    trained: Engine, store: ScriptedStore, loader: str
) -> None:
    rollout = f"never-{loader}"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True}
    try:
        answer = abort_in_the_middle(trained, store, rollout, body, resume=False)
    finally:
        control(trained, "/resume")
    assert answer.status_code == 503
    assert "did not resume within 20 s" in answer.text
    check_cut(store, rollout, "did not resume")


def test_an_agent_that_leaves_during_the_pause_leaves_nothing_behind(
    trained: Engine, store: ScriptedStore, loader: str
) -> None:
    rollout = f"left-{loader}"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"{trained.base(rollout)}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        control(trained, "/pause?mode=abort")
    span, _ = call_of(store, rollout)
    assert span.model_call.outcome == model_call_pb2.MODEL_CALL_OUTCOME_CUT
    control(trained, "/resume")
    store.wait(lambda: trained.metric("vllm:num_requests_running") == 0, "an idle engine")
    assert trained.metric("vllm:num_requests_waiting") == 0
