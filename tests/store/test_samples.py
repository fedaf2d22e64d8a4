"""Samples of batches through a real server: streamed, replayed from a copy elsewhere, explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.client import NotFound, StoreClient, StoreError
from agl_grpc.model import Batch, EnqueueRolloutRequest, RolloutMode, TrainingRun
from agl_grpc.sample import (
    AttemptRecord,
    Sample,
    SampleRules,
    TokenAccount,
    Truncated,
    build_attempt,
    read_columns,
    token_digest,
    unpack,
)
from agl_grpc.sample.export import read_samples
from agl_grpc.sample.wire import account_from_proto, rules_to_proto
from agl_grpc.store.storage.sqlite import operations
from agl_grpc.v1 import model_call_pb2, reward_pb2, runner_service_pb2, span_pb2
from agl_grpc.v1 import store_service_pb2 as store_pb2
from agl_grpc.v1.attempt_pb2 import ATTEMPT_STATUS_SUCCEEDED
from tests.store.span_support import serving, span
from tests.support.store_process import StoreProcess

TURNS = 3


def conversation(number: int) -> list[span_pb2.Span]:
    """Three turns; the second and third prompts are differences. The last answer hits the length limit."""
    spans: list[span_pb2.Span] = []
    length = 0
    for turn in range(TURNS):
        own = [100 * number + turn, 7] if turn else [1, 2, 3, number]
        prompt = model_call_pb2.PromptTokens(token_ids=own)
        if turn:
            prompt.base_span_id, prompt.base_length = spans[-1].span_id, length
        call = model_call_pb2.ModelCall(
            model="tiny",
            prompt=prompt,
            mode="train",
            outcome=model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE,
            logprob_semantics=model_call_pb2.LOGPROB_SEMANTICS_PROCESSED,
        )
        finish = "length" if turn == TURNS - 1 else "stop"
        answer = call.choices.add(token_ids=[50 + turn, 60], logprobs=[-0.1, -1 / 3], finish_reason=finish)
        answer.policy_runs.add(start=0, end=1, policy_version=4)
        answer.policy_runs.add(start=1, end=2, policy_version=5)
        length += len(own) + 2
        spans.append(span("chat", os.urandom(8), model_call=call))
    return spans


async def claimed(client: StoreClient, count: int, rules: SampleRules) -> Batch:
    """A batch of sealed rollouts."""
    await client.enqueue_many_rollouts(
        [
            EnqueueRolloutRequest(input=number, mode=RolloutMode.TRAIN, group_id=f"g{number % 2}")
            for number in range(count)
        ]
    )
    leased = await client.bound.runner.LeaseRollouts(
        runner_service_pb2.LeaseRolloutsRequest(worker_id="w", session_id="s", limit=count)
    )
    ids = []
    for number, work in enumerate(leased.rollouts):
        lease = work.lease
        spans = conversation(number)
        sent = span_pb2.AttemptSpans(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, spans=spans)
        answer = await client.bound.store.AppendSpans(store_pb2.AppendSpansRequest(groups=[sent]))
        assert answer.stored == TURNS
        rewards = [
            reward_pb2.Reward(value=0.1 + number),
            reward_pb2.Reward(name="style", value=0.3),
            reward_pb2.Reward(value=0.5, step=0),
        ]
        done = runner_service_pb2.Completion(
            rollout_id=lease.rollout_id,
            attempt_id=lease.attempt_id,
            lease_token=lease.lease_token,
            status=ATTEMPT_STATUS_SUCCEEDED,
            rewards=rewards,
        )
        request = runner_service_pb2.CompleteAttemptsRequest(worker_id="w", completions=[done])
        await client.bound.runner.CompleteAttempts(request)
        ids.append(lease.rollout_id)
    await client.create_training_run(TrainingRun(training_run_id="tr", algorithm="test"))
    await client.acquire_training_run("tr", "t")
    return await client.claim_batch("tr", 1, 1, ids, rules=rules_to_proto(rules))


async def gathered(stream: AsyncIterator[Any]) -> tuple[list[Sample], TokenAccount]:
    samples, account = list[Sample](), TokenAccount()
    async for answer in stream:
        samples += unpack(read_columns(answer.samples))
        account.add(account_from_proto(answer.account))
    account.check()
    return samples, account


async def built_here(client: StoreClient, batch: Batch, rules: SampleRules) -> list[Sample]:
    """The same rows, built by the client from exported spans, their prompts as they are stored."""
    ids = [entry.rollout_id for entry in batch.entries]
    spans = [s async for s in client.export_spans(rollout_ids=ids, model_calls_only=True, delta_prompts=True)]
    assert any(s.span.model_call.prompt.base_span_id for s in spans)
    answer = await client.bound.store.ListRewards(store_pb2.ListRewardsRequest(rollout_ids=ids))
    rows = []
    for entry in batch.entries:
        own = [s for s in spans if s.attempt_id == entry.attempt_id]
        rewards = [r for r in answer.rewards if r.attempt_id == entry.attempt_id]
        record = AttemptRecord(entry.rollout_id, entry.attempt_id, entry.group_id or "", own, rewards)
        rows += build_attempt(record, rules).rows
    return rows


def same(first: list[Sample], second: list[Sample]) -> None:
    """Bit for bit."""
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in ("prompt_ids", "response_ids", "response_mask", "logprobs", "policy_versions"):
            here, there = getattr(one, name), getattr(other, name)
            assert (here.dtype, here.tobytes()) == (there.dtype, there.tobytes()), name
        for name in ("rollout_id", "attempt_id", "group_id", "reward", "temperature", "turns", "start"):
            assert getattr(one, name) == getattr(other, name), name
        assert dict(one.rewards) == dict(other.rewards)


@pytest.mark.parametrize("rules", [SampleRules(), SampleRules(truncated=Truncated.TRAIN, discount=0.5)])
async def test_a_batch_streams_what_a_client_builds_itself(
    database: Path | str | None, rules: SampleRules
) -> None:
    async with serving(database) as (server, _), StoreClient(server.address) as client:
        batch = await claimed(client, 5, rules)
        samples, account = await gathered(client.stream_batch(batch.batch_id))
        same(samples, await built_here(client, batch, rules))
        assert account.trained == sum(sample.trained_tokens for sample in samples)
        first = samples[0]
        assert first.response_ids.tolist() == [50, 60, 1, 7, 51, 60, 2, 7, 52, 60]
        last = 1 if rules.truncated is Truncated.TRAIN else 0
        assert first.response_mask.tolist() == [1, 1, 0, 0, 1, 1, 0, 0, last, last]
        assert first.policy_versions[:4].tolist() == [4, 5, -1, -1]
        assert first.rewards == {"primary": 0.1, "style": 0.3}
        one = rules.discount
        assert [turn.ret for turn in first.turns] == pytest.approx([0.5 + one * one * 0.1, one * 0.1, 0.1])
        # A later judgement changes no batch that is made.
        entry = batch.entries[0]
        later = reward_pb2.Reward(rollout_id=entry.rollout_id, attempt_id=entry.attempt_id, value=9.0)
        await client.bound.store.PutRewards(store_pb2.PutRewardsRequest(rewards=[later]))
        same((await gathered(client.replay_batch(batch.content_hash)))[0], samples)
        assert await client.get_batch(content_hash=batch.content_hash) == batch


async def test_every_token_of_a_batch_is_explained(database: Path | str | None) -> None:
    async with serving(database) as (server, _), StoreClient(server.address) as client:
        batch = await claimed(client, 2, SampleRules())
        _, account = await gathered(client.stream_batch(batch.batch_id))
        counts: dict[str, int] = {}
        for entry in batch.entries:
            for span_id in entry.span_ids:
                answer = await client.explain_tokens(entry.rollout_id, span_id)
                ends = [stretch.end for stretch in answer.explanations]
                assert [stretch.start for stretch in answer.explanations] == [0, *ends[:-1]]
                for stretch in answer.explanations:
                    word = stretch.reason.partition(":")[0]
                    counts[word] = counts.get(word, 0) + stretch.end - stretch.start
        assert counts["sampled"] == account.trained
        assert counts["prompt"] + counts["between_turns"] == account.observation
        assert {word: counts[word] for word in account.dropped} == account.dropped
        await client.release_batches("tr", 1, [batch.batch_id])
        entry = batch.entries[0]
        answer = await client.explain_tokens(entry.rollout_id, entry.span_ids[0])
        assert {e.reason.partition(":")[0] for e in answer.explanations} == {"not_claimed"}
        with pytest.raises(NotFound):
            await client.explain_tokens(entry.rollout_id, "00" * 7 + "01")
        with pytest.raises(StoreError, match="released"):
            await gathered(client.stream_batch(batch.batch_id))


async def test_a_batch_is_replayed_from_a_copy_by_another_process(tmp_path: Path) -> None:
    async with serving(tmp_path / "here.db") as (server, _), StoreClient(server.address) as client:
        batch = await claimed(client, 4, SampleRules())
        await client.commit_batches("tr", 1, "ck", [batch.batch_id], step=1)
        samples, account = await gathered(client.stream_batch(batch.batch_id))
        operations.backup(tmp_path / "here.db", tmp_path / "there.db", force=False)
    with StoreProcess(tmp_path / "there.db") as process:
        async with StoreClient(process.address) as client:
            again, counted = await gathered(client.replay_batch(batch.content_hash))
            same(again, samples)
            assert counted == account
            with pytest.raises(NotFound):
                await gathered(client.replay_batch("sha256:00"))
        commands(process.address, batch, samples, tmp_path)


def commands(address: str, batch: Batch, samples: list[Sample], folder: Path) -> None:
    """The commands say and write the same."""

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "agl_grpc_cli", *arguments, "--store", address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    assert batch.content_hash in run("batch", "ls", "tr")
    assert batch.entries[1].attempt_id in run("batch", "show", batch.batch_id)
    for form in ("parquet", "safetensors", "jsonl"):
        file = folder / f"again.{form}"
        said = run("batch", "replay", batch.content_hash, "--output", str(file))
        assert token_digest(samples) in said
        same(list(read_samples(file)), samples)
    entry = batch.entries[0]
    stretches = json.loads(run("sample", "explain", entry.rollout_id, "--token", "0", "--json"))
    assert [each["fate"] for each in stretches] == ["observation", "dropped", "dropped"]
    assert run("sample", "export", "default", "--output", str(file)) == f"{file}  4 rows of 4 rollouts\n"
    run("sample", "export", "default", "--output", str(file), "--min-reward", "2")
    assert [sample.reward for sample in read_samples(file)] == [2.1, 3.1]
    run("sample", "export", "default", "--output", str(file), "--best-of-group", "1")
    assert [(sample.group_id, sample.reward) for sample in read_samples(file)] == [("g0", 2.1), ("g1", 3.1)]
    run("sample", "export", "default", "--output", str(file), "--best-of-group", "1", "--min-reward", "3")
    assert [sample.reward for sample in read_samples(file)] == [3.1]
    assert "no batch 'ba-0'" in run("batch", "show", "ba-0", code=1)
    assert "format 'txt'" in run("batch", "replay", batch.batch_id, "--output", "x.txt", code=1)
