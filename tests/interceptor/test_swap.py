"""New weights into a real vLLM while it generates: exact versions, the right logprobs, no unbounded wait."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest

from agl_grpc.v1 import (
    model_call_pb2,
    policy_pb2,
    run_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
)
from tests.interceptor.engine import Engine, engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.interceptor.together import Together
from tests.support.store_process import StoreProcess
from tests.support.torch_client import TorchClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RECEIVED = policy_pb2.ENGINE_PHASE_RECEIVED
ACTIVE = policy_pb2.ENGINE_PHASE_ACTIVE
FAILED = policy_pb2.ENGINE_PHASE_FAILED


def offer(
    number: int, endpoint: str, transfer: str, seconds: float = 60.0, model: str = "tiny"
) -> policy_pb2.PolicyVersion:
    version = policy_pb2.PolicyVersion(
        run_id="run-1", model=model, policy_version=number, status=policy_pb2.POLICY_VERSION_STATUS_PREPARING
    )
    version.source.rendezvous = endpoint
    version.source.group_id = transfer
    version.source.engine_ids.append(engine_id(model))
    version.deadline.FromNanoseconds(int((time.time() + seconds) * 1e9))
    return version


def engine_id(model: str) -> str:
    """The engine as the store knows it; an adapter is one of its own."""
    return "engine-1" if model == "tiny" else f"engine-1/{model}"


class Swaps:
    """An engine, its store and a learner that sends."""

    def __init__(self, running: Engine, store: ScriptedStore, client: TorchClient, folder: Path) -> None:
        self.running = running
        self.store = store
        self.client = client
        self._folder = folder

    def weights(self, number: int, model: str = "tiny") -> str:
        return str(self._folder / f"{model}-v{number}.safetensors")

    def send(
        self,
        number: int,
        *,
        flip: bool = False,
        rename: dict[str, str] | None = None,
        adapter: int = 0,
        model: str = "tiny",
    ) -> Sent:
        """Offer and send a version, all weights or an adapter of this rank; it may be staged or not."""
        out, base = self.weights(number, model), str(self.running.model)
        if adapter:
            what: dict[str, Any] = {"do": "adapt", "seed": sum(model.encode()) + number, "rank": adapter}
        else:
            what = {"do": "perturb", "seed": number}
        endpoint = self.client.call(what.pop("do"), model=base, out=out, rename=rename or {}, **what)
        transfer = f"{model}-t{number}"
        version = offer(number, endpoint, transfer, model=model)
        self.store.publish(version)
        report = self.client.call("send", out=out, transfer=transfer, flip=flip)
        return Sent(version, report["digest"], report["bytes"])

    def swap(self, number: int, adapter: int, model: str) -> policy_pb2.EngineState:
        """Send an adapter and commit it; the engine's last word on it."""
        sent = self.send(number, adapter=adapter, model=model)
        self.store.state(number, RECEIVED, engine_id=engine_id(model))
        self.store.publish(sent.commit())
        active = self.store.state(number, ACTIVE, engine_id=engine_id(model))
        assert active.weights_digest == sent.digest
        return active

    def logprobs(
        self, number: int, prompt: list[int], response: list[int], model: str = "tiny"
    ) -> list[float]:
        """What transformers says under a version; 0 is the model on disk."""
        (answer,) = self.client.call(
            "logprobs",
            model=str(self.running.model),
            weights=self.weights(number, model) if number else "",
            rows=[{"prompt": prompt, "response": response}],
        )
        return list(answer)

    def samples_from(
        self, number: int, rollout: str, prompt: list[int], tokens: int = 20, model: str = "tiny"
    ) -> None:
        """Assert that the engine samples from a version and says so."""
        generate(self.running, rollout, prompt, tokens, model)
        ((span, _),) = self.store.calls_of(rollout)
        choice = span.model_call.choices[0]
        assert span.model_call.model == model
        assert [r.policy_version for r in choice.policy_runs] == [number]
        expected = self.logprobs(number, prompt, list(choice.token_ids), model)
        assert list(choice.logprobs) == pytest.approx(expected, abs=1e-4)


class Sent(NamedTuple):
    version: policy_pb2.PolicyVersion
    digest: str
    bytes: int

    def commit(self, digest: str = "") -> policy_pb2.PolicyVersion:
        committed = policy_pb2.PolicyVersion()
        committed.CopyFrom(self.version)
        committed.status = policy_pb2.POLICY_VERSION_STATUS_COMMITTED
        committed.weights_digest = digest or self.digest
        return committed


@pytest.fixture
def fresh(tiny_model: Path, tmp_path: Path, torch_client: TorchClient) -> Iterator[Swaps]:
    """An engine of its own: swaps change it for good."""
    with ScriptedStore() as store, engine(tiny_model, store.address, tmp_path) as started:
        yield Swaps(started, store, torch_client, tmp_path)


def generate(
    running: Engine, rollout: str, prompt: list[int], tokens: int, model: str = "tiny"
) -> dict[str, Any]:
    body = {
        "model": model,
        "token_ids": prompt,
        "sampling_params": {"max_tokens": tokens, "ignore_eos": True, "logprobs": 0},
    }
    answer = httpx.post(f"{running.base(rollout)}/inference/v1/generate", json=body, timeout=120)
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


def test_a_life_of_swaps(fresh: Swaps) -> None:
    swap_while_generating(fresh)
    flipped_byte_blocks_the_commit(fresh)
    wrong_digest_blocks_the_commit(fresh)
    deadline_passes(fresh)
    unknown_tensor_is_refused_before_any_pause(fresh)
    store_restart_keeps_the_watch(fresh)
    adapters_are_added_to_the_base(fresh)


def swap_while_generating(fresh: Swaps) -> None:
    running, store = fresh.running, fresh.store
    # A prompt longer than a cache block: a prefix computed under old weights must not be reused.
    prompt = [1, *range(30, 80)]
    fresh.samples_from(0, "before", prompt, 5)
    sent = fresh.send(1)
    assert store.state(1, RECEIVED).weights_digest == sent.digest
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: generate(running, f"mid-{n}", prompt, 440)}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    store.wait(lambda: len(store.open_calls) == 3, "three open calls")
    time.sleep(0.3)  # the engine must be in the middle of its answers, which nothing announces
    store.publish(sent.commit())
    active = store.state(1, ACTIVE)
    assert 0 < active.pause_ns < 5e9
    assert active.weights_digest == sent.digest
    for thread in threads:
        thread.join()
    for number in range(3):
        two_versions_in_one_answer(fresh, f"mid-{number}", answers[number], sent.digest)
    fresh.samples_from(1, "after", prompt)


def two_versions_in_one_answer(fresh: Swaps, rollout: str, answer: dict[str, Any], digest: str) -> None:
    ((span, prompt),) = fresh.store.calls_of(rollout)
    choice = span.model_call.choices[0]
    tokens, logprobs = list(choice.token_ids), list(choice.logprobs)
    assert tokens == answer["token_ids"]
    runs = [(r.policy_version, r.start, r.end) for r in choice.policy_runs]
    assert [version for version, _, _ in runs] == [0, 1], runs
    assert [(int(v["version"]), v["start"], v["end"]) for v in answer["weight_versions"]] == runs
    assert span.model_call.untrainable_reason == ""
    assert span.model_call.weights_digest == digest
    old, new = fresh.logprobs(0, prompt, tokens), fresh.logprobs(1, prompt, tokens)
    cut = runs[0][2]
    assert 5 < cut < 435
    assert logprobs[:cut] == pytest.approx(old[:cut], abs=1e-4)
    assert logprobs[cut:] == pytest.approx(new[cut:], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(new[cut:], old[cut:], strict=True)) > 0.01


def flipped_byte_blocks_the_commit(fresh: Swaps) -> None:
    sent = fresh.send(2, flip=True)
    assert "digest mismatch: tensor" in fresh.store.state(2, FAILED).error
    reports = len(fresh.store.states)
    fresh.store.publish(sent.commit())
    fresh.store.wait(lambda: len(fresh.store.states) > reports, "the refusal of the commit")
    assert "not staged here" in fresh.store.states[-1].error
    fresh.samples_from(1, "after-flip", [1, 2, 3])


def wrong_digest_blocks_the_commit(fresh: Swaps) -> None:
    sent = fresh.send(3)
    fresh.store.state(3, RECEIVED)
    fresh.store.publish(sent.commit("sha256:" + "0" * 64))
    assert "is not the staged" in fresh.store.state(3, FAILED).error
    fresh.samples_from(1, "after-wrong-digest", [1, 2, 3])


def deadline_passes(fresh: Swaps) -> None:
    started = time.monotonic()
    fresh.store.publish(offer(4, "127.0.0.1:9", "t4", seconds=2.0))
    error = fresh.store.state(4, FAILED, limit=20).error
    assert time.monotonic() - started < 10
    assert "cannot reach the sender" in error or "deadline" in error
    fresh.samples_from(1, "after-deadline", [1, 2, 3])


def unknown_tensor_is_refused_before_any_pause(fresh: Swaps) -> None:
    fresh.send(5, rename={"model.norm.weight": "model.unknown"})
    assert re.search("lack|have an unknown", fresh.store.state(5, FAILED).error)
    fresh.samples_from(1, "after-unknown", [1, 2, 3])


def store_restart_keeps_the_watch(fresh: Swaps) -> None:
    fresh.store.stop()
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    assert httpx.post(f"{fresh.running.url}/v1/completions", json=body, timeout=60).status_code == 200
    fresh.store.start()
    sent = fresh.send(6)
    fresh.store.state(6, RECEIVED)
    fresh.store.publish(sent.commit())
    fresh.store.state(6, ACTIVE)
    fresh.samples_from(6, "six", [1, 2, 3, 4])


def adapters_are_added_to_the_base(fresh: Swaps) -> None:
    """An adapter replaces the one before, whatever was loaded between: it is added to the model on disk."""
    whole = fresh.send(7)
    fresh.store.state(7, RECEIVED)
    fresh.store.publish(whole.commit())
    fresh.store.state(7, ACTIVE)
    for number in (8, 9):
        sent = fresh.send(number, adapter=4)
        assert sent.bytes < whole.bytes / 3
        fresh.store.state(number, RECEIVED)
        fresh.store.publish(sent.commit())
        fresh.store.state(number, ACTIVE)
        fresh.samples_from(number, f"adapter-{number}", [1, 2, 3, 4])


ADAPTERS = ("--adapter", "planner", "--adapter", "solver", "--max-lora-rank", "8")


@pytest.fixture
def adapted(tiny_model: Path, tmp_path: Path, torch_client: TorchClient) -> Iterator[Swaps]:
    """An engine that serves two adapters of its model."""
    with ScriptedStore() as store, engine(tiny_model, store.address, tmp_path, *ADAPTERS) as started:
        yield Swaps(started, store, torch_client, tmp_path)


def test_adapters_of_one_engine_have_each_their_own_versions(adapted: Swaps) -> None:
    prompt = [1, *range(30, 80)]
    for name in ("planner", "solver", "tiny"):
        adapted.samples_from(0, f"{name}-0", prompt, model=name)
    adapted.swap(1, 8, "solver")
    what_an_adapter_cannot_be_is_refused(adapted)
    one_changes_in_the_middle_of_its_answer_and_the_other_does_not(adapted, prompt)
    adapted.samples_from(1, "planner-1", prompt, model="planner")
    adapted.swap(5, 8, "solver")
    # The longest prefix that is cached belongs to older weights: it must not be used.
    adapted.samples_from(5, "solver-5", prompt, model="solver")
    adapted.samples_from(1, "planner-still-1", prompt, model="planner")
    adapted.samples_from(0, "base", prompt)
    assert served_versions(adapted.running) == {"planner": 1, "solver": 5}
    adapters_outlive_their_engine(adapted, {"planner": 1, "solver": 5})


def served_versions(running: Engine) -> dict[str, int]:
    """The policy version of each adapter, as the engine says."""
    described = httpx.get(f"{running.url}/agl/interceptor", timeout=30).json()
    versions: dict[str, int] = described["policy_versions"]
    return versions


def what_an_adapter_cannot_be_is_refused(adapted: Swaps) -> None:
    """Before anything is paused; the adapter that serves goes on."""
    adapted.send(2, model="solver")
    error = adapted.store.state(2, FAILED, engine_id=engine_id("solver")).error
    assert "sent whole weights: train it with actor_rollout_ref.model.lora_rank" in error
    adapted.send(3, adapter=16, model="solver")
    error = adapted.store.state(3, FAILED, engine_id=engine_id("solver")).error
    assert error == "the adapter has rank 16, the engine takes 8: start it with --max-lora-rank 16"
    adapted.send(4, adapter=4, model="solver", rename={"layers.0.": "layers.9."})
    error = adapted.store.state(4, FAILED, engine_id=engine_id("solver")).error
    assert re.fullmatch(
        r"the adapter changes model\.layers\.9\..*, of which this model takes no adapter", error
    )
    adapted.samples_from(1, "solver-refused", [1, 2, 3], model="solver")


def one_changes_in_the_middle_of_its_answer_and_the_other_does_not(adapted: Swaps, prompt: list[int]) -> None:
    running, store = adapted.running, adapted.store
    sent = adapted.send(1, adapter=4, model="planner")
    store.state(1, RECEIVED, engine_id=engine_id("planner"))
    before = running.generated()
    threads = [
        threading.Thread(target=generate, args=(running, f"mid-{name}", prompt, 440, name))
        for name in ("planner", "solver")
    ]
    for thread in threads:
        thread.start()
    store.wait(lambda: running.generated() > before + 60, "answers under way")
    store.publish(sent.commit())
    assert 0 < store.state(1, ACTIVE, engine_id=engine_id("planner")).pause_ns < 5e9
    for thread in threads:
        thread.join()
    for name, versions in (("planner", [0, 1]), ("solver", [1])):
        ((span, _),) = store.calls_of(f"mid-{name}")
        choice = span.model_call.choices[0]
        assert span.model_call.untrainable_reason == ""
        assert [run.policy_version for run in choice.policy_runs] == versions
        assert (span.model_call.weights_digest == sent.digest) == (name == "planner")
        tokens = list(choice.token_ids)
        for run in choice.policy_runs:
            expected = adapted.logprobs(run.policy_version, prompt, tokens, name)[run.start : run.end]
            assert list(choice.logprobs)[run.start : run.end] == pytest.approx(expected, abs=1e-4)


def adapters_outlive_their_engine(adapted: Swaps, versions: dict[str, int]) -> None:
    """An engine that is killed comes back with each adapter's committed weights, and takes newer ones.

    Which they are it asks a real store, which takes the place of the scripted one.
    """
    adapted.running.process.kill()
    adapted.running.process.wait(10)
    client, folder = adapted.client, adapted.running.log.parent
    digests = {
        name: adapted.store.state(number, ACTIVE, engine_id=engine_id(name)).weights_digest
        for name, number in versions.items()
    }
    with StoreProcess(folder / "store.db") as server, grpc.insecure_channel(server.address) as channel:
        store: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="run-1")))
        trainer: Any = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        for name, number in versions.items():
            prepare(trainer, name, number)
            commit(trainer, name, number, digests[name])
        with engine(adapted.running.model, server.address, folder, *ADAPTERS) as again:
            together = Together(server, again, channel)
            # It had them before it served anybody.
            assert served_versions(again) == versions
            for name, number in versions.items():
                together.samples_from(client, number, adapted.weights(number, name), asked=name)
                state = together.version(number, ACTIVE, engine_id=engine_id(name), model=name)
                assert state.weights_digest == digests[name]
            out = adapted.weights(6, "solver")
            endpoint = client.call("adapt", model=str(again.model), out=out, seed=6, rank=4, rename={})
            prepare(trainer, "solver", 6, endpoint)
            digest = client.call("send", out=out, transfer="solver/6")["digest"]
            together.version(6, RECEIVED, engine_id="engine-1/solver", model="solver")
            commit(trainer, "solver", 6, digest)
            together.version(6, ACTIVE, engine_id="engine-1/solver", model="solver")
            together.samples_from(client, 6, out, asked="solver")
            assert served_versions(again) == {**versions, "solver": 6}
            planner = versions["planner"]
            together.samples_from(client, planner, adapted.weights(planner, "planner"), asked="planner")


def prepare(trainer: Any, model: str, number: int, endpoint: str = "") -> None:
    """Offer a version to the engine that serves the adapter; without an endpoint to none."""
    request = trainer_service_pb2.PreparePolicyVersionRequest(
        request_id=f"p/{model}/{number}", run_id="run-1", model=model, policy_version=number
    )
    request.deadline.FromSeconds(60)
    request.source.rendezvous, request.source.group_id = endpoint, f"{model}/{number}"
    if endpoint:
        request.source.engine_ids.append(engine_id(model))
    trainer.PreparePolicyVersion(request)


def commit(trainer: Any, model: str, number: int, digest: str) -> None:
    trainer.CommitPolicyVersion(
        trainer_service_pb2.CommitPolicyVersionRequest(
            request_id=f"c/{model}/{number}",
            run_id="run-1",
            model=model,
            policy_version=number,
            weights_digest=digest,
        )
    )


ENDLESS = 1900
"""Tokens of an answer that is not meant to reach its end: seconds of sampling, also on a quick machine."""


@pytest.fixture
def cutting(tiny_model: Path, tmp_path: Path, torch_client: TorchClient) -> Iterator[Swaps]:
    """An engine that cuts what still runs, and lets a rollout make two calls."""
    options = (
        *("--running-on-swap", "cut", "--swap-timeout", "0.2", "--max-calls", "2"),
        *("--max-model-len", str(ENDLESS + 100)),
    )
    with ScriptedStore() as store, engine(tiny_model, store.address, tmp_path, *options) as started:
        yield Swaps(started, store, torch_client, tmp_path)


def test_a_life_of_an_engine_that_cuts(cutting: Swaps) -> None:
    first_load_fails_and_the_weights_come_back_from_disk(cutting)
    what_still_runs_is_cut(cutting)
    a_rollout_makes_its_calls_and_no_more(cutting)


def first_load_fails_and_the_weights_come_back_from_disk(fresh: Swaps) -> None:
    sent = fresh.send(1, rename={"model.norm.weight": "model.unknown"})
    fresh.store.state(1, RECEIVED)
    fresh.store.publish(sent.commit())
    assert "the old weights were restored" in fresh.store.state(1, FAILED).error
    fresh.samples_from(0, "restored", [1, 2, 3])


def what_still_runs_is_cut(fresh: Swaps) -> None:
    """Each agent is told so in its dialect, every token until then is recorded, later calls are served."""
    running, store = fresh.running, fresh.store
    sent = fresh.send(2)
    store.state(2, RECEIVED)
    answers: dict[str, httpx.Response] = {}
    body = {"model": "tiny", "max_tokens": ENDLESS, "ignore_eos": True, "n": 4}
    asked = {
        "chat": ("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "hello"}]}),
        "stream": ("/v1/completions", {**body, "prompt": "hello", "stream": True}),
        "messages": (
            "/v1/messages",
            {"model": "tiny", "max_tokens": ENDLESS, "messages": [{"role": "user", "content": "hello"}]},
        ),
    }
    before = running.generated()
    threads = [
        threading.Thread(
            target=lambda name=name: answers.update(
                {name: httpx.post(running.base(name) + asked[name][0], json=asked[name][1], timeout=120)}
            )
        )
        for name in asked
    ]
    for thread in threads:
        thread.start()
    store.wait(lambda: running.generated() > before + 50, "answers under way")
    store.publish(sent.commit())
    assert store.state(2, ACTIVE).weights_digest == sent.digest
    for thread in threads:
        thread.join()
    reason = "cut after 0.2 s: new weights are being loaded"
    assert (answers["chat"].status_code, answers["stream"].status_code) == (503, 200)
    assert reason in answers["chat"].json()["error"]["message"]
    assert reason in answers["stream"].text
    for name in ("chat", "stream"):
        ((span, _),) = store.wait(lambda name=name: store.calls_of(name), f"the record of {name}")
        call = span.model_call
        assert (call.outcome, span.status.message) == (model_call_pb2.MODEL_CALL_OUTCOME_CUT, reason)
        assert len(call.choices) == 4
        for choice in call.choices:
            assert 0 < len(choice.token_ids) == len(choice.logprobs) < ENDLESS
            assert [run.policy_version for run in choice.policy_runs] == [0]
    fresh.samples_from(2, "after-cut", [1, 2, 3])


def a_rollout_makes_its_calls_and_no_more(fresh: Swaps) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    url = f"{fresh.running.base('limited')}/v1"
    statuses = [httpx.post(f"{url}/completions", json=body, timeout=60) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert statuses[-1].json()["error"]["code"] == "rollout_limit"
    assert statuses[-1].headers["x-should-retry"] == "false"
    assert httpx.get(f"{url}/models", timeout=60).status_code == 200
    assert httpx.post(f"{fresh.running.url}/v1/completions", json=body, timeout=60).status_code == 200
