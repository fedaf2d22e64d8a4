"""Training runs, batches, policy versions and resources through a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from agl_grpc.store.door.app import StoreServer
from agl_grpc.store.training import batches
from agl_grpc.v1 import (
    attempt_pb2,
    batch_pb2,
    policy_pb2,
    resources_pb2,
    reward_pb2,
    rollout_pb2,
    runner_service_pb2,
    runner_service_pb2_grpc,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
    training_pb2,
)
from tests.store.span_support import append, call_span, reason_of, serving, span
from tests.support.waiting import eventually


@dataclass
class Served:
    """A server with its three stubs."""

    server: StoreServer
    store: Any
    runner: Any
    trainer: Any


@pytest.fixture
async def served(database: Path | str | None) -> AsyncIterator[Served]:
    async with serving(database) as (server, channel):
        yield Served(
            server,
            store_service_pb2_grpc.StoreServiceStub(channel),
            runner_service_pb2_grpc.RunnerServiceStub(channel),
            trainer_service_pb2_grpc.TrainerServiceStub(channel),
        )


async def refused(call: Any, reason: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert reason_of(caught.value) == reason
    return caught.value


async def finished(
    served: Served, count: int, group: str = "g", mode: rollout_pb2.RolloutMode | None = None
) -> list[tuple[str, str, list[bytes]]]:
    """Sealed rollouts with two model calls and a reward each: (rollout, attempt, span ids)."""
    specs = [rollout_pb2.RolloutSpec(group_id=group, mode=mode) for _ in range(count)]
    await served.store.EnqueueRollouts(store_service_pb2.EnqueueRolloutsRequest(rollouts=specs))
    leased = await served.runner.LeaseRollouts(
        runner_service_pb2.LeaseRolloutsRequest(worker_id="w", session_id="s", limit=count)
    )
    made = []
    for number, work in enumerate(leased.rollouts):
        calls = [call_span([1, 2], [3]), call_span([4], [5])]
        names = (work.lease.rollout_id, work.lease.attempt_id)
        sent = span_pb2.AttemptSpans(
            rollout_id=names[0], attempt_id=names[1], spans=[calls[0], span("tool"), calls[1]]
        )
        assert (await append(served.store, sent)).stored == 3
        done = runner_service_pb2.Completion(
            rollout_id=names[0],
            attempt_id=names[1],
            lease_token=work.lease.lease_token,
            status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED,
            rewards=[reward_pb2.Reward(value=0.0 if number == 0 else float(number))],
        )
        answer = await served.runner.CompleteAttempts(
            runner_service_pb2.CompleteAttemptsRequest(worker_id="w", completions=[done])
        )
        assert not answer.results[0].HasField("error"), answer
        made.append((*names, [one.span_id for one in calls]))
    return made


async def acquired(served: Served, name: str = "tr-1", trainer: str = "t1") -> training_pb2.TrainingRun:
    run = training_pb2.TrainingRun(training_run_id=name, algorithm="verl")
    if trainer == "t1":
        await served.trainer.CreateTrainingRun(trainer_service_pb2.CreateTrainingRunRequest(training_run=run))
    answer = await served.trainer.AcquireTrainingRun(
        trainer_service_pb2.AcquireTrainingRunRequest(training_run_id=name, trainer_id=trainer)
    )
    return answer.training_run  # type: ignore[no-any-return] # the stub is Any


def claiming(rollouts: list[str], epoch: int = 1, **more: Any) -> trainer_service_pb2.ClaimBatchRequest:
    return trainer_service_pb2.ClaimBatchRequest(
        training_run_id="tr-1", trainer_epoch=epoch, step=1, rollout_ids=rollouts, **more
    )


async def test_a_batch_freezes_rewards_and_calls(served: Served) -> None:
    made = await finished(served, 3)
    await acquired(served)
    order = [made[2][0], made[0][0]]
    batch = (await served.trainer.ClaimBatch(claiming(order))).batch
    assert [entry.rollout_id for entry in batch.entries] == order
    assert [entry.group_id for entry in batch.entries] == ["g", "g"]
    assert [entry.reward for entry in batch.entries] == [2.0, 0.0]
    assert batch.entries[1].HasField("reward")
    assert [list(entry.span_ids) for entry in batch.entries] == [made[2][2], made[0][2]]
    assert batch.content_hash == batches.content_hash(
        entry.SerializeToString(deterministic=True) for entry in batch.entries
    )
    # A later judgement changes no batch that is made.
    await served.store.PutRewards(
        store_service_pb2.PutRewardsRequest(
            rewards=[reward_pb2.Reward(rollout_id=made[2][0], attempt_id=made[2][1], value=9.0)]
        )
    )
    listed = await served.trainer.ListBatches(trainer_service_pb2.ListBatchesRequest(training_run_id="tr-1"))
    assert listed.batches == [batch]
    rewards = await served.store.ListRewards(store_service_pb2.ListRewardsRequest(rollout_ids=[made[2][0]]))
    assert [(reward.value, reward.revision) for reward in rewards.rewards] == [(9.0, 2)]
    every = await served.store.ListRewards(
        store_service_pb2.ListRewardsRequest(rollout_ids=[made[2][0]], all_revisions=True)
    )
    assert [reward.value for reward in every.rewards] == [2.0, 9.0]
    await refused(served.trainer.ClaimBatch(claiming([made[2][0]])), "ILLEGAL_TRANSITION")
    second = (await served.trainer.ClaimBatch(claiming([made[1][0]]))).batch
    assert second.content_hash != batch.content_hash
    # What a batch names is not deleted.
    gone = await served.store.DeleteRollouts(store_service_pb2.DeleteRolloutsRequest())
    assert (gone.deleted, gone.kept) == (0, 3)


async def test_unsealed_rollouts_are_named_and_nothing_is_claimed(served: Served) -> None:
    made = await finished(served, 1)
    waiting = (
        await served.store.EnqueueRollouts(
            store_service_pb2.EnqueueRolloutsRequest(rollouts=[rollout_pb2.RolloutSpec()])
        )
    ).rollouts[0]
    await acquired(served)
    answer = await served.trainer.ClaimBatch(claiming([made[0][0], waiting.rollout_id]))
    assert answer.unsealed_rollout_ids == [waiting.rollout_id]
    assert not answer.HasField("batch")
    assert (await served.trainer.ClaimBatch(claiming([made[0][0]]))).HasField("batch")
    await refused(served.trainer.ClaimBatch(claiming([])), "INVALID_FIELD")
    await refused(served.trainer.ClaimBatch(claiming(["ro-none"])), "ENTITY_NOT_FOUND")


async def test_what_evaluates_is_never_trained(served: Served) -> None:
    """A batch with one rollout of validation in it is refused whole, whoever asks."""
    made = await finished(served, 1)
    await acquired(served)
    for mode, name in ((rollout_pb2.ROLLOUT_MODE_VAL, "val"), (rollout_pb2.ROLLOUT_MODE_TEST, "test")):
        ((evaluated, *_),) = await finished(served, 1, mode=mode)
        error = await refused(served.trainer.ClaimBatch(claiming([made[0][0], evaluated])), "INVALID_FIELD")
        assert f"names {evaluated}, whose mode is {name}" in (error.details() or "")
    assert (await served.trainer.ClaimBatch(claiming([made[0][0]]))).HasField("batch")


async def test_commits_follow_the_checkpoint_and_claims_go_back_to_the_next_epoch(served: Served) -> None:
    made = await finished(served, 4)
    first = await acquired(served)
    assert (first.trainer_epoch, first.status) == (1, training_pb2.TRAINING_RUN_STATUS_RUNNING)
    claims = [(await served.trainer.ClaimBatch(claiming([row[0]]))).batch for row in made]
    commit = trainer_service_pb2.CommitBatchesRequest(
        training_run_id="tr-1",
        trainer_epoch=1,
        checkpoint_id="ck-2",
        batch_ids=[claims[0].batch_id, claims[1].batch_id],
        step=2,
        request_id="once",
    )
    answer = await served.trainer.CommitBatches(commit)
    assert (answer.training_run.checkpoint_id, answer.training_run.step) == ("ck-2", 2)
    assert await served.trainer.CommitBatches(commit) == answer
    commit.request_id = "again"
    assert await served.trainer.CommitBatches(commit) == answer
    release = trainer_service_pb2.ReleaseBatchesRequest(
        training_run_id="tr-1", trainer_epoch=1, batch_ids=[claims[0].batch_id]
    )
    await refused(served.trainer.ReleaseBatches(release), "ILLEGAL_TRANSITION")

    second = await acquired(served, trainer="t2")
    assert (second.trainer_epoch, second.step, second.checkpoint_id) == (2, 2, "ck-2")
    error = await refused(served.trainer.ClaimBatch(claiming([made[2][0]])), "TRAINER_FENCED")
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    await refused(served.trainer.CommitBatches(commit_of(1, claims[2].batch_id)), "TRAINER_FENCED")
    await refused(served.trainer.CommitBatches(commit_of(2, claims[2].batch_id)), "ILLEGAL_TRANSITION")
    released = await served.trainer.ListBatches(
        trainer_service_pb2.ListBatchesRequest(
            training_run_id="tr-1", status_in=[batch_pb2.BATCH_STATUS_RELEASED]
        )
    )
    assert [batch.batch_id for batch in released.batches] == [batch.batch_id for batch in claims[2:]]
    # Judged anew in between: the batch that had been made is made again as it was, another one is not.
    judged = [
        reward_pb2.Reward(rollout_id=made[row][0], attempt_id=made[row][1], value=7.0) for row in (2, 3)
    ]
    await served.store.PutRewards(store_service_pb2.PutRewardsRequest(rewards=judged))
    again = (await served.trainer.ClaimBatch(claiming([made[2][0]], epoch=2))).batch
    assert again.content_hash == claims[2].content_hash
    assert again.batch_id != claims[2].batch_id
    later = claiming([made[3][0]], epoch=2)
    later.step = 2
    assert [entry.reward for entry in (await served.trainer.ClaimBatch(later)).batch.entries] == [7.0]
    await refused(served.trainer.ClaimBatch(claiming([made[0][0]], epoch=2)), "ILLEGAL_TRANSITION")


def commit_of(epoch: int, batch_id: str) -> trainer_service_pb2.CommitBatchesRequest:
    return trainer_service_pb2.CommitBatchesRequest(
        training_run_id="tr-1", trainer_epoch=epoch, checkpoint_id="ck-9", batch_ids=[batch_id], step=9
    )


async def test_metrics_are_merged_watched_and_carry_the_request_to_stop(served: Served) -> None:
    await acquired(served)

    def report(step: int, epoch: int = 1, **values: float) -> trainer_service_pb2.ReportMetricsRequest:
        metrics = [training_pb2.Metric(name=name, value=value) for name, value in values.items()]
        return trainer_service_pb2.ReportMetricsRequest(
            training_run_id="tr-1",
            trainer_epoch=epoch,
            steps=[training_pb2.StepMetrics(step=step, metrics=metrics)],
        )

    await served.trainer.ReportMetrics(report(0, reward=0.1))
    await served.trainer.ReportMetrics(report(1, reward=0.2))
    watch = served.trainer.WatchTrainingRun(
        trainer_service_pb2.WatchTrainingRunRequest(training_run_id="tr-1", from_step=1)
    )
    first = await watch.read()
    assert first.training_run.step == 1
    assert [step.step for step in first.steps] == [1]
    await served.trainer.ReportMetrics(report(1, loss=3.0))
    merged = (await watch.read()).steps[0]
    assert {metric.name: metric.value for metric in merged.metrics} == {"reward": 0.2, "loss": 3.0}
    stop = trainer_service_pb2.StopTrainingRunRequest(training_run_id="tr-1")
    await served.trainer.StopTrainingRun(stop)
    assert (await watch.read()).training_run.status == training_pb2.TRAINING_RUN_STATUS_STOPPING
    told = await served.trainer.ReportMetrics(report(2, reward=0.3))
    assert told.training_run.status == training_pb2.TRAINING_RUN_STATUS_STOPPING
    await refused(served.trainer.ReportMetrics(report(2, epoch=0, reward=1.0)), "TRAINER_FENCED")
    await served.trainer.FinishTrainingRun(
        trainer_service_pb2.FinishTrainingRunRequest(
            training_run_id="tr-1", trainer_epoch=1, status=training_pb2.TRAINING_RUN_STATUS_STOPPED
        )
    )
    rest = []
    while (answer := await watch.read()) is not grpc.aio.EOF:
        rest.append(answer)
    assert [step.step for answer in rest for step in answer.steps] == [2]
    assert rest[-1].training_run.status == training_pb2.TRAINING_RUN_STATUS_STOPPED
    await refused(served.trainer.ReportMetrics(report(3, reward=1.0)), "ILLEGAL_TRANSITION")
    resumed = await acquired(served, trainer="t2")
    assert (resumed.status, resumed.trainer_epoch) == (training_pb2.TRAINING_RUN_STATUS_RUNNING, 2)
    listed = await served.trainer.ListTrainingRuns(
        trainer_service_pb2.ListTrainingRunsRequest(status_in=[training_pb2.TRAINING_RUN_STATUS_RUNNING])
    )
    assert [run.training_run_id for run in listed.training_runs] == ["tr-1"]


def offer(version: int, *engines: str, seconds: float = 60.0) -> Any:
    return trainer_service_pb2.PreparePolicyVersionRequest(
        model="tiny",
        policy_version=version,
        source=policy_pb2.WeightSource(group_id=f"g{version}", engine_ids=engines),
        deadline=duration_pb2.Duration(nanos=int(seconds % 1 * 1e9), seconds=int(seconds)),
    )


def says(engine: str, version: int, phase: int, digest: str = "") -> Any:
    return trainer_service_pb2.ReportEngineStateRequest(
        engine=policy_pb2.Engine(engine_id=engine, model="tiny", endpoint="http://e"),
        state=policy_pb2.EngineState(policy_version=version, phase=phase, weights_digest=digest),
    )


def decide(version: int, digest: str) -> Any:
    return trainer_service_pb2.CommitPolicyVersionRequest(
        model="tiny", policy_version=version, weights_digest=digest
    )


async def test_a_version_is_committed_only_when_every_engine_holds_it(served: Served) -> None:
    trainer = served.trainer
    watch = trainer.WatchPolicyVersions(
        trainer_service_pb2.WatchPolicyVersionsRequest(engine_id="e1", include_existing=True)
    )
    assert (await watch.read()).checkpoint
    await refused(trainer.ReportEngineState(says("e1", 1, 1)), "ENTITY_NOT_FOUND")
    await trainer.PreparePolicyVersion(offer(1, "e1"))
    assert (await watch.read()).policy_versions[0].status == policy_pb2.POLICY_VERSION_STATUS_PREPARING
    error = await refused(trainer.CommitPolicyVersion(decide(1, "sha256:a")), "WEIGHTS_REJECTED")
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    received = policy_pb2.ENGINE_PHASE_RECEIVED
    known = await trainer.ReportEngineState(says("e1", 1, received, "sha256:b"))
    assert known.engine.connected
    await refused(trainer.CommitPolicyVersion(decide(1, "sha256:a")), "WEIGHTS_REJECTED")
    committed = await trainer.CommitPolicyVersion(decide(1, "sha256:b"))
    assert committed.policy_version.status == policy_pb2.POLICY_VERSION_STATUS_COMMITTED
    assert await trainer.CommitPolicyVersion(decide(1, "sha256:b")) == committed
    states = []
    while policy_pb2.POLICY_VERSION_STATUS_COMMITTED not in states:
        states += [version.status for version in (await watch.read()).policy_versions]
    await refused(trainer.PreparePolicyVersion(offer(1, "e1")), "ILLEGAL_TRANSITION")
    aborting = trainer_service_pb2.AbortPolicyVersionRequest(model="tiny", policy_version=1)
    await refused(trainer.AbortPolicyVersion(aborting), "ILLEGAL_TRANSITION")
    newest = await trainer.GetPolicyVersion(trainer_service_pb2.GetPolicyVersionRequest(model="tiny"))
    assert newest.policy_version.policy_version == 1
    again = trainer.WatchPolicyVersions(trainer_service_pb2.WatchPolicyVersionsRequest(include_existing=True))
    assert [version.policy_version for version in (await again.read()).policy_versions] == [1]
    watch.cancel()

    async def gone() -> bool:
        answer = await trainer.ListEngines(trainer_service_pb2.ListEnginesRequest(model="tiny"))
        return [(engine.engine_id, engine.connected) for engine in answer.engines] == [("e1", False)]

    await eventually(gone, what="the engine's disconnection")


async def test_a_version_is_aborted_by_its_deadline_or_by_the_next(served: Served) -> None:
    trainer = served.trainer
    watch = trainer.WatchPolicyVersions(trainer_service_pb2.WatchPolicyVersionsRequest(model="tiny"))
    assert (await watch.read()).checkpoint
    await trainer.PreparePolicyVersion(offer(1, seconds=0.05))

    async def aborted(version: int, reason: str) -> None:
        async with asyncio.timeout(5):
            while True:
                for found in (await watch.read()).policy_versions:
                    if found.policy_version == version and reason in found.abort_reason:
                        assert found.status == policy_pb2.POLICY_VERSION_STATUS_ABORTED
                        return

    await aborted(1, "deadline")
    # An aborted version may be offered anew, with nothing left of what engines said.
    await trainer.ReportEngineState(says("e1", 1, policy_pb2.ENGINE_PHASE_RECEIVED))
    offered = (await trainer.PreparePolicyVersion(offer(1))).policy_version
    assert (offered.status, list(offered.engine_states)) == (policy_pb2.POLICY_VERSION_STATUS_PREPARING, [])
    await trainer.PreparePolicyVersion(offer(2))
    await aborted(1, "replaced by version 2")
    versions = await trainer.ListPolicyVersions(trainer_service_pb2.ListPolicyVersionsRequest())
    assert [version.policy_version for version in versions.policy_versions] == [2, 1]


async def test_resources_rise_in_version_and_are_pushed(served: Served) -> None:
    store = served.store

    def publication(text: str, resources_id: str = "") -> Any:
        prompt = resources_pb2.Resource(
            name="main", prompt_template=resources_pb2.PromptTemplate(template=text)
        )
        return store_service_pb2.PublishResourcesRequest(resources_id=resources_id, resources=[prompt])

    watch = store.WatchResources(store_service_pb2.WatchResourcesRequest(include_latest=True))
    assert (await watch.read()).checkpoint
    nothing = await store.GetLatestResources(store_service_pb2.GetLatestResourcesRequest())
    assert not nothing.HasField("resources")
    first = (await store.PublishResources(publication("a", "rs-a"))).resources
    pushed = await watch.read()
    assert pushed.resources == [first]
    second = (await store.PublishResources(publication("b"))).resources
    third = (await store.PublishResources(publication("c", "rs-a"))).resources
    assert [one.version for one in (first, second, third)] == [1, 1, 2]
    latest = await store.GetLatestResources(store_service_pb2.GetLatestResourcesRequest())
    assert latest.resources == third
    resumed = store.WatchResources(store_service_pb2.WatchResourcesRequest(cursor=pushed.cursor))
    seen: list[resources_pb2.ResourceSet] = []
    while len(seen) < 2:
        seen += (await resumed.read()).resources
    assert seen == [second, third]
    old = await store.GetResources(store_service_pb2.GetResourcesRequest(resources_id="rs-a", version=1))
    assert old.resources == first
    newest = await store.ListResources(store_service_pb2.ListResourcesRequest(include_total=True))
    assert ([*newest.resources], newest.total_size) == ([second, third], 2)
    every = await store.ListResources(
        store_service_pb2.ListResourcesRequest(all_versions=True, resources_id="rs-a")
    )
    assert [*every.resources] == [first, third]
    missing = store_service_pb2.GetResourcesRequest(resources_id="rs-a", version=7)
    await refused(store.GetResources(missing), "ENTITY_NOT_FOUND")
    twice = publication("x")
    twice.resources.append(twice.resources[0])
    error = await refused(store.PublishResources(twice), "INVALID_FIELD")
    assert "resources[1].name" in str(error.details())
