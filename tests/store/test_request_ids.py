"""R13 for every mutation of the contract: a repeat answers the same, changes nothing, and survives a restart.

The methods are found in the contract's descriptors: one with a `request_id` that has no scene here fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from agl_grpc.store.clock import ManualClock
from agl_grpc.v1 import (
    policy_pb2,
    reward_pb2,
    rollout_pb2,
    runner_service_pb2,
    store_service_pb2,
    trainer_service_pb2,
    training_pb2,
)
from tests.store.rig import FAILED, SUCCEEDED, Rig, held, reason, running
from tests.support.tables import Tables, difference, dump

MODULES = (store_service_pb2, runner_service_pb2, trainer_service_pb2)
MUTATIONS = {
    method.name: method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if "request_id" in method.input_type.fields_by_name
}

Scene = Callable[[Rig], Awaitable[tuple[Any, Any]]]
"""Sets the store up; returns a request that changes something, and another one for the same method."""

scenes: dict[str, Scene] = {}


def scene(make: Scene) -> Scene:
    """Registers a scene under its method's name."""
    scenes["".join(part.title() for part in make.__name__.split("_"))] = make
    return make


def chosen(*rollout_ids: str) -> rollout_pb2.RolloutFilter:
    """A filter for rollouts."""
    return rollout_pb2.RolloutFilter(rollout_id_in=rollout_ids)


@scene
async def create_run(rig: Rig) -> tuple[Any, Any]:
    make = store_service_pb2.CreateRunRequest
    return make(run={"run_id": "r1"}), make(run={"run_id": "r2"})


@scene
async def update_run(rig: Rig) -> tuple[Any, Any]:
    def make(allow: bool) -> Any:
        request = store_service_pb2.UpdateRunRequest(run={"run_id": "default", "allow_self_grading": allow})
        request.update_mask.paths.append("allow_self_grading")
        return request

    return make(True), make(False)


@scene
async def pause_dispatch(rig: Rig) -> tuple[Any, Any]:
    make = store_service_pb2.PauseDispatchRequest
    return make(run_id="default"), make(run_id="default", queue="q")


@scene
async def resume_dispatch(rig: Rig) -> tuple[Any, Any]:
    await rig.store.PauseDispatch(store_service_pb2.PauseDispatchRequest(run_id="default", queue="q"))
    make = store_service_pb2.ResumeDispatchRequest
    return make(run_id="default", queue="q"), make(run_id="default")


@scene
async def start_rollout(rig: Rig) -> tuple[Any, Any]:
    make = store_service_pb2.StartRolloutRequest
    return make(worker_id="w1"), make(worker_id="w2")


@scene
async def enqueue_rollouts(rig: Rig) -> tuple[Any, Any]:
    make = store_service_pb2.EnqueueRolloutsRequest
    spec = rollout_pb2.RolloutSpec(group_id="g", queue="q", labels=[{"key": "k", "value": "v"}])
    return make(rollouts=[spec, spec]), make(rollouts=[spec])


@scene
async def start_attempt(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    make = store_service_pb2.StartAttemptRequest
    return make(rollout_id="a", worker_id="w1"), make(rollout_id="a", worker_id="w2")


@scene
async def dequeue_rollouts(rig: Rig) -> tuple[Any, Any]:
    for name in "ab":
        await rig.enqueue(rollout_id=name)
    make = store_service_pb2.DequeueRolloutsRequest
    return make(worker_id="w1"), make(worker_id="w1", limit=2)


@scene
async def update_rollout(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")

    def make(priority: int) -> Any:
        request = store_service_pb2.UpdateRolloutRequest(rollout={"rollout_id": "a", "priority": priority})
        request.update_mask.paths.append("priority")
        return request

    return make(5), make(6)


@scene
async def cancel_rollouts(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    await rig.lease()
    make = store_service_pb2.CancelRolloutsRequest
    return make(filter=chosen("a")), make(filter=chosen("a"), reason="other")


@scene
async def retry_rollouts(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    await rig.complete(*await rig.lease(), status=FAILED)
    make = store_service_pb2.RetryRolloutsRequest
    return make(filter=chosen("a")), make(filter=chosen("b"))


@scene
async def delete_rollouts(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    await rig.complete(*await rig.lease())
    make = store_service_pb2.DeleteRolloutsRequest
    return make(filter=chosen("a")), make(filter=chosen("a"), dry_run=True)


@scene
async def update_attempt(rig: Rig) -> tuple[Any, Any]:
    started = await rig.store.StartRollout(store_service_pb2.StartRolloutRequest())

    def make(status: int) -> Any:
        attempt = {"attempt_id": started.rollout.attempt.attempt_id, "status": status}
        request = store_service_pb2.UpdateAttemptRequest(attempt=attempt)
        request.update_mask.paths.append("status")
        return request

    return make(SUCCEEDED), make(FAILED)


@scene
async def reserve_span_sequences(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    key = {"rollout_id": "a", "attempt_id": leased.attempt.attempt_id}
    make = store_service_pb2.ReserveSpanSequencesRequest
    return make(keys=[key, key]), make(keys=[key])


@scene
async def put_rewards(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()

    def make(value: float) -> Any:
        reward = reward_pb2.Reward(rollout_id="a", attempt_id=leased.attempt.attempt_id, value=value)
        return store_service_pb2.PutRewardsRequest(rewards=[reward], lease_token=leased.lease.lease_token)

    return make(0.0), make(1.0)


@scene
async def publish_resources(rig: Rig) -> tuple[Any, Any]:
    make = store_service_pb2.PublishResourcesRequest
    return make(resources_id="rs"), make(resources_id="other")


@scene
async def expire_leases(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    await rig.lease()
    make = store_service_pb2.ExpireLeasesRequest
    return make(worker_id="w1"), make(worker_id="w2")


@scene
async def drain_workers(rig: Rig) -> tuple[Any, Any]:
    for worker in ("w1", "w2"):
        await rig.lease(worker=worker)
    make = store_service_pb2.DrainWorkersRequest
    return make(worker_ids=["w1"]), make(worker_ids=["w2"])


@scene
async def lease_rollouts(rig: Rig) -> tuple[Any, Any]:
    for name in "abc":
        await rig.enqueue(rollout_id=name)
    make = runner_service_pb2.LeaseRolloutsRequest
    return make(worker_id="w1", session_id="s", limit=2), make(worker_id="w1", session_id="s", limit=1)


@scene
async def complete_attempts(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()

    def make(status: int) -> Any:
        request = runner_service_pb2.CompleteAttemptsRequest(worker_id="w1")
        request.completions.add(
            attempt_id=leased.attempt.attempt_id,
            lease_token=leased.lease.lease_token,
            status=status,
            rewards=[reward_pb2.Reward(value=1.0)],
        )
        return request

    return make(SUCCEEDED), make(FAILED)


@scene
async def release_attempts(rig: Rig) -> tuple[Any, Any]:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    make = runner_service_pb2.ReleaseAttemptsRequest
    leases = [held(leased)]
    return make(worker_id="w1", leases=leases), make(worker_id="w1", leases=leases, reason="other")


async def training(rig: Rig) -> None:
    """A training run that epoch 1 holds."""
    run = training_pb2.TrainingRun(training_run_id="tr", algorithm="verl")
    await rig.trainer.CreateTrainingRun(trainer_service_pb2.CreateTrainingRunRequest(training_run=run))
    await rig.trainer.AcquireTrainingRun(
        trainer_service_pb2.AcquireTrainingRunRequest(training_run_id="tr", trainer_id="t")
    )


async def batch(rig: Rig) -> str:
    """A claimed batch of the training run."""
    await training(rig)
    await rig.enqueue(rollout_id="a")
    await rig.complete(*await rig.lease())
    answer = await rig.trainer.ClaimBatch(
        trainer_service_pb2.ClaimBatchRequest(training_run_id="tr", trainer_epoch=1, rollout_ids=["a"])
    )
    return str(answer.batch.batch_id)


@scene
async def create_training_run(rig: Rig) -> tuple[Any, Any]:
    make = trainer_service_pb2.CreateTrainingRunRequest
    return make(training_run={"algorithm": "verl"}), make(training_run={"algorithm": "apo"})


@scene
async def acquire_training_run(rig: Rig) -> tuple[Any, Any]:
    await training(rig)
    make = trainer_service_pb2.AcquireTrainingRunRequest
    return make(training_run_id="tr", trainer_id="t1"), make(training_run_id="tr", trainer_id="t2")


@scene
async def finish_training_run(rig: Rig) -> tuple[Any, Any]:
    await training(rig)
    make = trainer_service_pb2.FinishTrainingRunRequest
    named = {"training_run_id": "tr", "trainer_epoch": 1}
    return (
        make(status=training_pb2.TRAINING_RUN_STATUS_SUCCEEDED, **named),
        make(status=training_pb2.TRAINING_RUN_STATUS_FAILED, **named),
    )


@scene
async def stop_training_run(rig: Rig) -> tuple[Any, Any]:
    await training(rig)
    make = trainer_service_pb2.StopTrainingRunRequest
    return make(training_run_id="tr"), make(training_run_id="tr", reason="other")


@scene
async def report_metrics(rig: Rig) -> tuple[Any, Any]:
    await training(rig)
    make = trainer_service_pb2.ReportMetricsRequest
    named = {"training_run_id": "tr", "trainer_epoch": 1}
    step = training_pb2.StepMetrics(step=1, metrics=[{"name": "reward", "value": 0.5}])
    return make(steps=[step], **named), make(**named)


@scene
async def claim_batch(rig: Rig) -> tuple[Any, Any]:
    await training(rig)
    for name in "ab":
        await rig.enqueue(rollout_id=name)
    await rig.complete(*await rig.lease(limit=2))
    make = trainer_service_pb2.ClaimBatchRequest
    named = {"training_run_id": "tr", "trainer_epoch": 1}
    return make(rollout_ids=["a", "b"], **named), make(rollout_ids=["a"], **named)


@scene
async def commit_batches(rig: Rig) -> tuple[Any, Any]:
    named = {"training_run_id": "tr", "trainer_epoch": 1, "batch_ids": [await batch(rig)]}
    make = trainer_service_pb2.CommitBatchesRequest
    return make(checkpoint_id="c1", **named), make(checkpoint_id="c2", **named)


@scene
async def release_batches(rig: Rig) -> tuple[Any, Any]:
    named = {"training_run_id": "tr", "trainer_epoch": 1}
    make = trainer_service_pb2.ReleaseBatchesRequest
    return make(batch_ids=[await batch(rig)], **named), make(**named)


def prepared(version: int) -> trainer_service_pb2.PreparePolicyVersionRequest:
    """Offers weights."""
    source = policy_pb2.WeightSource(path="/weights", engine_ids=["e1"])
    return trainer_service_pb2.PreparePolicyVersionRequest(model="m", policy_version=version, source=source)


def reported(phase: int, version: int) -> trainer_service_pb2.ReportEngineStateRequest:
    """An engine's word on a version."""
    state = policy_pb2.EngineState(policy_version=version, phase=phase, weights_digest="sha256:00")
    return trainer_service_pb2.ReportEngineStateRequest(
        engine={"engine_id": "e1", "run_id": "default", "model": "m"}, state=state
    )


@scene
async def prepare_policy_version(rig: Rig) -> tuple[Any, Any]:
    return prepared(1), prepared(2)


@scene
async def report_engine_state(rig: Rig) -> tuple[Any, Any]:
    await rig.trainer.PreparePolicyVersion(prepared(1))
    return reported(policy_pb2.ENGINE_PHASE_RECEIVED, 1), reported(policy_pb2.ENGINE_PHASE_RECEIVING, 1)


@scene
async def commit_policy_version(rig: Rig) -> tuple[Any, Any]:
    await rig.trainer.PreparePolicyVersion(prepared(1))
    await rig.trainer.ReportEngineState(reported(policy_pb2.ENGINE_PHASE_RECEIVED, 1))
    make = trainer_service_pb2.CommitPolicyVersionRequest
    named = {"model": "m", "policy_version": 1}
    return make(weights_digest="sha256:00", **named), make(weights_digest="sha256:11", **named)


@scene
async def abort_policy_version(rig: Rig) -> tuple[Any, Any]:
    await rig.trainer.PreparePolicyVersion(prepared(1))
    make = trainer_service_pb2.AbortPolicyVersionRequest
    return make(model="m", policy_version=1), make(model="m", policy_version=1, reason="other")


async def tables(rig: Rig) -> Tables:
    """Everything in the database."""
    return await rig.server.store.read(lambda db: dump(db, rig.server.store.database.backend))


async def call(rig: Rig, name: str, request: Message) -> Any:
    """Calls a method, of whichever service it is."""
    for stub in (rig.store, rig.runner, rig.trainer):
        if hasattr(stub, name):
            return await getattr(stub, name)(request)
    raise AssertionError(f"no service has {name}")


def test_every_mutation_of_the_contract_has_a_scene() -> None:
    assert scenes.keys() == MUTATIONS.keys()


@pytest.mark.parametrize("database", ["file", "postgres"], indirect=True)
@pytest.mark.parametrize("name", sorted(MUTATIONS))
async def test_a_repeat_answers_the_same_and_changes_nothing(name: str, database: Path | str) -> None:
    clock = ManualClock()
    async with running(database, clock) as rig:
        request, other = await scenes[name](rig)
        before = await tables(rig)
        request.request_id = other.request_id = "one-call"
        first = await call(rig, name, request)
        after = await tables(rig)
        changed = difference(before, after).keys() - {"requests"}
        assert changed, "the scene's request changes nothing: its repeat would prove nothing"
        clock.advance(1)
        again = await call(rig, name, request)
        assert again.SerializeToString() == first.SerializeToString()
        assert difference(after, await tables(rig)) == {}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(rig, name, other)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert reason(caught.value) == "REQUEST_ID_REUSED"
        assert difference(after, await tables(rig)) == {}
    # A server that starts on the same database knows the call too.
    async with running(database, clock) as rig:
        after = await tables(rig)
        last = await call(rig, name, request)
        assert last.SerializeToString() == first.SerializeToString()
        assert difference(after, await tables(rig)) == {}


async def test_concurrent_repeats_are_one_call(rig: Rig) -> None:
    request = store_service_pb2.EnqueueRolloutsRequest(request_id="x", rollouts=[rollout_pb2.RolloutSpec()])
    calls = [rig.store.EnqueueRollouts(request) for _ in range(20)]
    answers = {(await one).SerializeToString() for one in calls}
    assert len(answers) == 1
    listed = await rig.store.ListRollouts(store_service_pb2.ListRolloutsRequest())
    assert len(listed.rollouts) == 1
