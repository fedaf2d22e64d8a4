"""New weights into a real vLLM while it generates: exact versions, the right logprobs, no unbounded wait."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agl_grpc.v1 import policy_pb2
from tests.interceptor.engine import Engine, engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.environments import REPOSITORY, engine_environment, engine_python, run_in_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RECEIVING, RECEIVED = policy_pb2.ENGINE_PHASE_RECEIVING, policy_pb2.ENGINE_PHASE_RECEIVED
ACTIVE, FAILED = policy_pb2.ENGINE_PHASE_ACTIVE, policy_pb2.ENGINE_PHASE_FAILED


class Learner:
    """The sending half in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.endpoint = process.stdout.readline().strip()
        assert self.endpoint, "the sender did not start"

    def send(self, transfer: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{transfer}\n")
        self._process.stdin.flush()

    def report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextlib.contextmanager
def learner(model: Path, out: Path, seed: int, scenario: str = "honest") -> Iterator[Learner]:
    command = [
        engine_python(),
        "-m",
        "tests.interceptor.send_weights",
        str(model),
        str(out),
        str(seed),
        scenario,
    ]
    with (out.parent / f"{out.stem}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=engine_environment(), cwd=REPOSITORY,
        )  # fmt: skip
    try:
        yield Learner(process)
    finally:
        process.communicate(timeout=30)


def offer(number: int, endpoint: str, transfer: str, seconds: float = 60.0) -> policy_pb2.PolicyVersion:
    version = policy_pb2.PolicyVersion(
        run_id="run-1", model="tiny", policy_version=number, status=policy_pb2.POLICY_VERSION_STATUS_PREPARING
    )
    version.source.rendezvous = endpoint
    version.source.group_id = transfer
    version.source.engine_ids.append("engine-1")
    version.deadline.FromNanoseconds(int((time.time() + seconds) * 1e9))
    return version


def commit(version: policy_pb2.PolicyVersion, digest: str) -> policy_pb2.PolicyVersion:
    committed = policy_pb2.PolicyVersion()
    committed.CopyFrom(version)
    committed.status = policy_pb2.POLICY_VERSION_STATUS_COMMITTED
    committed.weights_digest = digest
    return committed


def recompute(model: Path, weights: Path | None, rows: list[dict[str, Any]]) -> list[list[float]]:
    asked = {"model": str(model), "weights": None if weights is None else str(weights), "rows": rows}
    answer: list[list[float]] = json.loads(
        run_in_engine("tests.interceptor.recompute", stdin=json.dumps(asked)).splitlines()[-1]
    )
    return answer


@pytest.fixture
def fresh(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[Engine, ScriptedStore]]:
    """An engine of its own: swaps change it for good."""
    with ScriptedStore() as store, engine(tiny_model, store.address, tmp_path) as started:
        yield started, store


def generate(running: Engine, rollout: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": tokens, "ignore_eos": True, "logprobs": 0}}
    answer = httpx.post(f"{running.base(rollout)}/inference/v1/generate", json=body, timeout=120)
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


def test_a_life_of_swaps(fresh: tuple[Engine, ScriptedStore], tiny_model: Path, tmp_path: Path) -> None:
    running, store = fresh
    swap_while_generating(running, store, tiny_model, tmp_path)
    flipped_byte_blocks_the_commit(running, store, tiny_model, tmp_path)
    wrong_digest_blocks_the_commit(running, store, tiny_model, tmp_path)
    deadline_passes(running, store)
    unknown_tensor_is_refused_before_any_pause(running, store, tiny_model, tmp_path)
    store_restart_keeps_the_watch(running, store, tiny_model, tmp_path)


def swap_while_generating(running: Engine, store: ScriptedStore, model: Path, folder: Path) -> None:
    # A prompt longer than a cache block: a prefix computed under old weights must not be reused.
    prompt = [1, *range(30, 80)]
    generate(running, "before", prompt, 5)
    weights = folder / "v1.safetensors"
    with learner(model, weights, seed=1) as sending:
        version = offer(1, sending.endpoint, "t1")
        store.publish(version)
        sending.send("t1")
        digest = sending.report()["digest"]
        assert store.state(1, RECEIVED).weights_digest == digest
    answers: dict[str, Any] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: answers.update({str(n): generate(running, f"mid-{n}", prompt, 440)})
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    store.wait(lambda: len(store.open_calls) == 3, "three open calls")
    time.sleep(0.3)  # the engine must be in the middle of its answers, which nothing announces
    store.publish(commit(version, digest))
    active = store.state(1, ACTIVE)
    assert 0 < active.pause_ns < 5e9
    assert active.weights_digest == digest
    for thread in threads:
        thread.join()
    for number in range(3):
        ((span, captured_prompt),) = store.calls_of(f"mid-{number}")
        choice = span.model_call.choices[0]
        tokens, logprobs = list(choice.token_ids), list(choice.logprobs)
        assert tokens == answers[str(number)]["token_ids"]
        runs = [(r.policy_version, r.start, r.end) for r in choice.policy_runs]
        assert [v for v, _, _ in runs] == [0, 1], runs
        spans = answers[str(number)]["weight_versions"]
        assert [(int(v["version"]), v["start"], v["end"]) for v in spans] == runs
        assert span.model_call.untrainable_reason == ""
        assert span.model_call.weights_digest == digest
        row = {"prompt": captured_prompt, "response": tokens}
        (old,), (new,) = recompute(model, None, [row]), recompute(model, weights, [row])
        cut = runs[0][2]
        assert 5 < cut < 435
        assert logprobs[:cut] == pytest.approx(old[:cut], abs=1e-4)
        assert logprobs[cut:] == pytest.approx(new[cut:], abs=1e-4)
        assert max(abs(a - b) for a, b in zip(new[cut:], old[cut:], strict=True)) > 0.01
    generate(running, "after", prompt, 30)
    ((span, _),) = store.calls_of("after")
    row = {"prompt": prompt, "response": list(span.model_call.choices[0].token_ids)}
    (expected,) = recompute(model, weights, [row])
    assert list(span.model_call.choices[0].logprobs) == pytest.approx(expected, abs=1e-4)


def serves_version_one(running: Engine, store: ScriptedStore, rollout: str) -> None:
    generate(running, rollout, [1, 2, 3], 5)
    ((span, _),) = store.calls_of(rollout)
    assert [r.policy_version for r in span.model_call.choices[0].policy_runs] == [1]


def flipped_byte_blocks_the_commit(running: Engine, store: ScriptedStore, model: Path, folder: Path) -> None:
    with learner(model, folder / "v2.safetensors", seed=2, scenario="flip") as sending:
        version = offer(2, sending.endpoint, "t2")
        store.publish(version)
        sending.send("t2")
        digest = sending.report()["digest"]
        assert "digest mismatch: tensor" in store.state(2, FAILED).error
    reports = len(store.states)
    store.publish(commit(version, digest))
    store.wait(lambda: len(store.states) > reports, "the refusal of the commit")
    assert "not staged here" in store.states[-1].error
    serves_version_one(running, store, "after-flip")


def wrong_digest_blocks_the_commit(running: Engine, store: ScriptedStore, model: Path, folder: Path) -> None:
    with learner(model, folder / "v3.safetensors", seed=3) as sending:
        version = offer(3, sending.endpoint, "t3")
        store.publish(version)
        sending.send("t3")
        sending.report()
        store.state(3, RECEIVED)
    store.publish(commit(version, "sha256:" + "0" * 64))
    assert "is not the staged" in store.state(3, FAILED).error
    serves_version_one(running, store, "after-wrong-digest")


def deadline_passes(running: Engine, store: ScriptedStore) -> None:
    started = time.monotonic()
    store.publish(offer(4, "127.0.0.1:9", "t4", seconds=2.0))
    error = store.state(4, FAILED, limit=20).error
    assert time.monotonic() - started < 10
    assert "cannot reach the sender" in error or "deadline" in error
    serves_version_one(running, store, "after-deadline")


def unknown_tensor_is_refused_before_any_pause(
    running: Engine, store: ScriptedStore, model: Path, folder: Path
) -> None:
    with learner(model, folder / "v5.safetensors", seed=5, scenario="renamed") as sending:
        store.publish(offer(5, sending.endpoint, "t5"))
        sending.send("t5")
        sending.report()
        assert "unknown" in store.state(5, FAILED).error or "lack" in store.state(5, FAILED).error
    serves_version_one(running, store, "after-unknown")


def store_restart_keeps_the_watch(running: Engine, store: ScriptedStore, model: Path, folder: Path) -> None:
    store.stop()
    serves = httpx.post(
        f"{running.url}/v1/completions",
        json={"model": "tiny", "prompt": "hello", "max_tokens": 2},
        timeout=60,
    )
    assert serves.status_code == 200
    store.start()
    weights = folder / "v6.safetensors"
    with learner(model, weights, seed=6) as sending:
        version = offer(6, sending.endpoint, "t6")
        store.publish(version)
        sending.send("t6")
        digest = sending.report()["digest"]
        store.state(6, RECEIVED)
    store.publish(commit(version, digest))
    store.state(6, ACTIVE)
    generate(running, "six", [1, 2, 3, 4], 20)
    ((span, _),) = store.calls_of("six")
    assert [r.policy_version for r in span.model_call.choices[0].policy_runs] == [6]
    row = {"prompt": [1, 2, 3, 4], "response": list(span.model_call.choices[0].token_ids)}
    (expected,) = recompute(model, weights, [row])
    assert list(span.model_call.choices[0].logprobs) == pytest.approx(expected, abs=1e-4)


def test_a_first_load_that_fails_restores_the_weights_from_disk(
    fresh: tuple[Engine, ScriptedStore], tiny_model: Path, tmp_path: Path
) -> None:
    running, store = fresh
    with learner(tiny_model, tmp_path / "bad.safetensors", seed=9, scenario="renamed") as sending:
        version = offer(1, sending.endpoint, "t1")
        store.publish(version)
        sending.send("t1")
        digest = sending.report()["digest"]
        store.state(1, RECEIVED)
    store.publish(commit(version, digest))
    assert "the old weights were restored" in store.state(1, FAILED).error
    generate(running, "restored", [1, 2, 3], 30)
    ((span, _),) = store.calls_of("restored")
    assert [r.policy_version for r in span.model_call.choices[0].policy_runs] == [0]
    row = {"prompt": [1, 2, 3], "response": list(span.model_call.choices[0].token_ids)}
    (expected,) = recompute(tiny_model, None, [row])
    assert list(span.model_call.choices[0].logprobs) == pytest.approx(expected, abs=1e-4)
