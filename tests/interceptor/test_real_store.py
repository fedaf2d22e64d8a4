"""Engine and store, both real: capture, sealing, a killed store, and a swap through TrainerService."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration

from agl_grpc.client import StoreClient
from agl_grpc.model import Reward, TrainingRun
from agl_grpc.model.rollout import seed_of
from agl_grpc.sample import SampleRules, Truncated, read_columns, unpack
from agl_grpc.sample.wire import rules_to_proto
from agl_grpc.v1 import (
    attempt_pb2,
    policy_pb2,
    rollout_pb2,
    run_pb2,
    store_service_pb2,
    trainer_service_pb2,
)
from tests.interceptor.engine import engine
from tests.interceptor.together import HELLO, Together
from tests.support.store_process import StoreProcess
from tests.support.torch_client import TorchClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OPTIONS = ("--unattributed", "record", "--on-swap", "refuse", "--running-on-swap", "finish")


@pytest.fixture(scope="module")
def together(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    folder = tmp_path_factory.mktemp("together")
    with (
        StoreProcess(folder / "store.db") as server,
        engine(tiny_model, server.address, folder, *OPTIONS) as running,
        grpc.insecure_channel(server.address) as channel,
    ):
        made = Together(server, running, channel)
        made.store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="run-1")))
        yield made


def test_a_conversation_is_stored_whole(together: Together) -> None:
    rollout, attempt = together.start_rollout()
    messages = list(HELLO)
    expected = []
    for _ in range(3):
        answer = together.ask(rollout, attempt, messages=messages)
        choice = answer["choices"][0]
        expected.append((answer["prompt_token_ids"], choice["token_ids"]))
        messages += [choice["message"] | {"role": "assistant"}, {"role": "user", "content": "and then?"}]
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    found = together.calls(rollout, 3)
    calls = [stored.span.model_call for stored in found]
    assert [(list(c.prompt.token_ids), list(c.choices[0].token_ids)) for c in calls] == expected
    assert not any(stored.late for stored in found)


def test_the_same_seed_samples_the_same_tokens_and_every_call_others(together: Together) -> None:
    def sampled(seed: str) -> list[list[int]]:
        rollout, attempt = together.start_rollout(seed)
        answers = [together.ask(rollout, attempt, temperature=1.0) for _ in range(2)]
        own = together.ask(rollout, attempt, temperature=1.0, seed=5)
        calls = [stored.span.model_call for stored in together.calls(rollout, 3)]
        assert [call.sampling.seed for call in calls] == [seed_of(seed, 1), seed_of(seed, 2), 5]
        return [answer["choices"][0]["token_ids"] for answer in (*answers, own)]

    first, again, other = sampled("11"), sampled("11"), sampled("12")
    assert first == again
    assert len({tuple(tokens) for tokens in (*first[:2], *other[:2])}) == 4
    # What the agent itself asks for is left as it is.
    assert first[2] == other[2]


def test_an_attempt_credential_as_api_key_attributes_the_call(together: Together) -> None:
    rollout, _ = together.start_rollout()
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    headers = {"Authorization": f"Bearer {together.credential}"}
    url = f"{together.running.url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200
    assert len(together.calls(rollout, 1)) == 1


def test_headers_attribute_the_call(together: Together) -> None:
    rollout, attempt = together.start_rollout()
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    headers = {
        "x-rollout-id": rollout,
        "x-attempt-id": attempt,
        "x-agl-agent": "planner",
        "x-agl-mode": "val",
    }
    url = f"{together.running.url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200
    (stored,) = together.calls(rollout, 1)
    assert (stored.span.model_call.agent_name, stored.span.model_call.mode) == ("planner", "val")


def test_the_agent_of_an_attempt_that_is_over_is_told_to_stop(together: Together) -> None:
    rollout, attempt = together.start_rollout()
    together.ask(rollout, attempt)
    request = store_service_pb2.UpdateAttemptRequest(
        attempt=attempt_pb2.Attempt(
            rollout_id=rollout, attempt_id=attempt, status=attempt_pb2.ATTEMPT_STATUS_FAILED
        )
    )
    request.update_mask.paths.append("status")
    together.store.UpdateAttempt(request)
    base = together.running.base(rollout, attempt)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    until = time.monotonic() + 30
    while (answer := httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)).status_code == 200:
        assert time.monotonic() < until, "the attempt's end has to reach the engine"
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "attempt_ended"
    assert "failed" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    anthropic = httpx.post(f"{base}/v1/messages", json=body, timeout=60)
    assert (anthropic.status_code, anthropic.json()["type"]) == (409, "error")
    # One record of the refusals, however often the agent asks.
    request = store_service_pb2.ListSpansRequest(rollout_id=rollout, page_size=1000)
    until = time.monotonic() + 30
    while not (
        refused := [
            stored
            for stored in together.store.ListSpans(request).spans
            if stored.span.status.message.startswith("409: ")
        ]
    ):
        assert time.monotonic() < until, "the refusal has to reach the store"
    assert [stored.late for stored in refused] == [True]


def test_a_superseded_attempt_is_refused_and_the_new_one_served(together: Together) -> None:
    again = attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE
    config = rollout_pb2.RolloutConfig(max_attempts=2, retry_condition=[again])
    rollout, first = together.start_rollout(config=config)
    together.ask(rollout, first)
    request = store_service_pb2.UpdateAttemptRequest(
        attempt=attempt_pb2.Attempt(rollout_id=rollout, attempt_id=first, status=again)
    )
    request.update_mask.paths.append("status")
    together.store.UpdateAttempt(request)
    started = together.store.StartAttempt(store_service_pb2.StartAttemptRequest(rollout_id=rollout))
    second = started.rollout.attempt.attempt_id
    assert second != first
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    base = together.running.base(rollout, first)
    until = time.monotonic() + 30
    while (answer := httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)).status_code == 200:
        assert time.monotonic() < until, "that the attempt is superseded has to reach the engine"
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert error["code"] == "attempt_ended"
    assert f"attempt {first} of rollout {rollout} is over (unresponsive)" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    together.ask(rollout, second)
    found = together.calls(rollout, 2)
    assert second in [stored.attempt_id for stored in found]


def test_calls_that_wait_for_their_turn_say_how_long(together: Together) -> None:
    """The engine runs 32 sequences at once."""
    rollout, attempt = together.start_rollout()
    together.ask(rollout, attempt)
    (stored,) = together.calls(rollout, 1)
    alone = stored.span.model_call.timings
    assert 0 <= alone.queue_ns <= alone.first_token_ns <= alone.total_ns
    asyncio.run(_crowd(together.running.base(rollout, attempt), 44))
    crowd = [stored.span.model_call.timings for stored in together.calls(rollout, 45)[1:]]
    assert len(crowd) == 44
    assert all(0 <= each.queue_ns <= each.first_token_ns <= each.total_ns for each in crowd)
    # Whoever has no place waits until the first of 32 answers has ended.
    answer = min(each.total_ns - each.first_token_ns for each in crowd)
    waited = sorted(each.queue_ns for each in crowd)
    assert waited[-12] > alone.queue_ns
    assert waited[-1] > answer / 4, (waited, answer)
    assert waited[0] < waited[-1] / 4, waited


async def _crowd(base: str, agents: int) -> None:
    """So many answers of 250 tokens, asked for at once."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 250, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as client:
        asked = [client.post(f"{base}/v1/chat/completions", json=body) for _ in range(agents)]
        answers = await asyncio.gather(*asked)
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [250] * agents


def test_a_forged_credential_is_refused(together: Together) -> None:
    together.start_rollout()
    forged = together.credential.rpartition(".")[0] + ".Zm9yZ2Vk"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    headers = {"Authorization": f"Bearer {forged}"}
    url = f"{together.running.url}/v1/chat/completions"
    until = time.monotonic() + 30
    # The first byte never waits for the store: the first answers may come before its word.
    while (answer := httpx.post(url, json=body, headers=headers, timeout=60)).status_code == 200:
        assert time.monotonic() < until, "the store's word has to reach the engine"
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_calls_that_name_no_attempt_become_rollouts_of_their_own(together: Together) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    url = f"{together.running.url}/v1/chat/completions"
    for session in ("s1", "s1", ""):
        headers = {"x-agl-session": session} if session else {}
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200
    request = store_service_pb2.ListRolloutsRequest()
    request.filter.run_id = "external"
    until = time.monotonic() + 30
    while True:
        runs = [run.run_id for run in together.store.ListRuns(store_service_pb2.ListRunsRequest()).runs]
        found = together.store.ListRollouts(request).rollouts if "external" in runs else []
        counts = sorted(len(together.calls(each.rollout.rollout_id, 1)) for each in found)
        if counts == [1, 2]:
            break
        assert time.monotonic() < until, counts
        time.sleep(0.05)
    labels = {(label.key, label.value) for each in found for label in each.rollout.labels}
    assert labels == {("source", "external")}
    asyncio.run(_learned_from_outside(together.server.address))


async def _learned_from_outside(address: str) -> None:
    """The session's reward arrives after its end, is frozen into a batch, and is revised for later ones."""
    async with StoreClient(address, run_id="external") as client:
        attempt = await client.get_latest_attempt("external.s1")
        assert attempt is not None
        place = {"rollout_id": "external.s1", "attempt_id": attempt.attempt_id}
        # The interceptor does so itself after five minutes without a call.
        await client.update_attempt(**place, status="succeeded")
        # The answers are cut by their three tokens.
        rules = rules_to_proto(SampleRules(model="tiny", truncated=Truncated.TRAIN))
        batches = []
        for value in (1.0, -1.0):
            (reward,) = await client.put_rewards([Reward(**place, value=value)])
            made = await client.create_training_run(TrainingRun(run_id="external", algorithm="own"))
            name = made.training_run_id
            epoch = (await client.acquire_training_run(name, "trainer")).trainer_epoch
            batches.append(await client.claim_batch(name, epoch, 1, ["external.s1"], rules=rules))
        assert reward.revision == 2
        assert [batch.entries[0].reward for batch in batches] == [1.0, -1.0]
        frozen = await client.get_batch(batches[0].batch_id)
        assert frozen is not None
        assert frozen.entries[0].reward == 1.0
        rows = [
            row
            async for answer in client.replay_batch(batches[0].content_hash)
            for row in unpack(read_columns(answer.samples))
        ]
        spans = await client.query_spans("external.s1", "latest")
    calls = [span.model_call for span in spans.items if span.model_call is not None]
    assert len(calls) == 2
    # Every token that the engine sampled, and no other.
    sampled = sum(len(call.choices[0].token_ids) for call in calls)
    assert sum(int(row.response_mask.sum()) for row in rows) == sampled > 0
    assert {row.reward for row in rows} == {1.0}


def test_a_killed_store_loses_nothing_and_stores_nothing_twice(together: Together) -> None:
    rollout, attempt = together.start_rollout()
    for number in range(12):
        if number == 3:
            together.server.kill()
        if number == 8:
            together.server.start()
        together.ask(rollout, attempt)
    found = together.calls(rollout, 12)
    assert len(found) == 12
    assert len({stored.span.span_id for stored in found}) == 12
    assert all(stored.span.model_call.choices[0].token_ids for stored in found)


def running_calls_finish_and_new_ones_are_refused(together: Together, commit: Callable[[], object]) -> None:
    rollouts = [together.start_rollout() for _ in range(4)]
    answers: list[dict[str, Any]] = []
    long = {"max_tokens": 400, "ignore_eos": True, "n": 4}
    threads = [
        threading.Thread(target=lambda names=names: answers.append(together.ask(*names, **long)))
        for names in rollouts
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while together.running.metric("vllm:num_requests_running") < 16:  # four choices of each of the four
        assert time.monotonic() < until
    commit()
    rollout, attempt = together.start_rollout()
    url = f"{together.running.base(rollout, attempt)}/v1/chat/completions"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    while (refused := httpx.post(url, json=body, timeout=120)).status_code == 200:
        assert time.monotonic() < until
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "weights_changing")
    assert refused.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert [len(c["token_ids"]) for answer in answers for c in answer["choices"]] == [400] * 16
    for names in rollouts:
        (stored,) = together.calls(names[0], 1)
        runs = [[r.policy_version for r in c.policy_runs] for c in stored.span.model_call.choices]
        assert runs == [[0]] * 4
    while (served := httpx.post(url, json=body, timeout=120)).status_code == 429:
        assert time.monotonic() < until
    assert served.status_code == 200


def test_a_swap_through_the_trainer_service_outlives_the_engine(
    together: Together, torch_client: TorchClient, tmp_path: Path
) -> None:
    out = str(tmp_path / "v1.safetensors")
    model = str(together.running.model)
    endpoint = torch_client.call("perturb", model=model, out=out, seed=1, rename={})
    request = trainer_service_pb2.PreparePolicyVersionRequest(
        request_id="p1", run_id="run-1", model="tiny", policy_version=1, deadline=Duration(seconds=60)
    )
    request.source.rendezvous = endpoint
    request.source.group_id = "real/1"
    request.source.engine_ids.append("engine-1")
    together.trainer.PreparePolicyVersion(request, wait_for_ready=True)
    digest = torch_client.call("send", out=out, transfer="real/1")["digest"]
    assert together.version(1, policy_pb2.ENGINE_PHASE_RECEIVED).weights_digest == digest
    commit = trainer_service_pb2.CommitPolicyVersionRequest(
        request_id="c1", run_id="run-1", model="tiny", policy_version=1, weights_digest=digest
    )
    running_calls_finish_and_new_ones_are_refused(
        together, lambda: together.trainer.CommitPolicyVersion(commit)
    )
    assert together.version(1, policy_pb2.ENGINE_PHASE_ACTIVE).pause_ns > 0
    together.samples_from(torch_client, 1, out)
    engines = together.trainer.ListEngines(trainer_service_pb2.ListEnginesRequest(run_id="run-1")).engines
    assert [(e.engine_id, e.active_policy_version, e.connected) for e in engines] == [("engine-1", 1, True)]
    # An engine that dies without a word goes on with the committed weights, not with its model folder's.
    together.running.process.kill()
    together.running.process.wait(10)
    folder = together.running.log.parent
    with engine(together.running.model, together.server.address, folder, "--engine-id", "again") as again:
        together.running = again
        together.samples_from(torch_client, 1, out)
        assert together.version(1, policy_pb2.ENGINE_PHASE_ACTIVE, engine_id="again").weights_digest == digest
