"""Training runs, batches, metrics, policy versions and engines against a real server."""

from __future__ import annotations

import asyncio

import pytest

from agl_grpc.client import IllegalTransition, NotFound, RolloutsUnsealed, StoreClient, TrainerFenced
from agl_grpc.model import (
    BatchStatus,
    Engine,
    EnginePhase,
    EngineState,
    PolicyVersionStatus,
    Reward,
    StepMetrics,
    TrainingRun,
    TrainingRunStatus,
    WeightSource,
)
from tests.support.waiting import eventually


async def _sealed(client: StoreClient, reward: float) -> str:
    rollout = await client.start_rollout(1, "train", group_id="g")
    keys = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    await client.put_rewards([Reward(**keys, value=reward)])
    await client.update_attempt(**keys, status="succeeded")
    return rollout.rollout_id


async def test_a_training_run_from_claim_to_commit(client: StoreClient) -> None:
    made = await client.create_training_run(
        TrainingRun(algorithm="verl", config={"lr": 1e-6}, metadata={"seed": 7})
    )
    assert (made.status, made.config, made.metadata) == (TrainingRunStatus.PENDING, {"lr": 1e-6}, {"seed": 7})
    name = made.training_run_id
    first = await client.acquire_training_run(name, "trainer-1")
    taken = await client.acquire_training_run(name, "trainer-2")
    assert (taken.status, taken.trainer_id) == (TrainingRunStatus.RUNNING, "trainer-2")
    epoch = taken.trainer_epoch
    ids = [await _sealed(client, value) for value in (1.0, 0.0, 0.5)]

    with pytest.raises(TrainerFenced):
        await client.claim_batch(name, first.trainer_epoch, 1, ids)
    running = await client.start_rollout(1)
    with pytest.raises(RolloutsUnsealed) as caught:
        await client.claim_batch(name, epoch, 1, [*ids[:2], running.rollout_id])
    assert caught.value.rollout_ids == [running.rollout_id]

    batch = await client.claim_batch(name, epoch, 1, ids[:2])
    assert [(entry.rollout_id, entry.reward, entry.group_id) for entry in batch.entries] == [
        (ids[0], 1.0, "g"),
        (ids[1], 0.0, "g"),
    ]
    assert batch.content_hash.startswith("sha256:")
    spare = await client.claim_batch(name, epoch, 2, ids[2:])
    await client.release_batches(name, epoch, [spare.batch_id])
    committed = await client.commit_batches(name, epoch, "ck-1", [batch.batch_id], step=1)
    assert (committed.checkpoint_id, committed.step) == ("ck-1", 1)
    batches = await client.query_batches(name)
    assert [b.status for b in batches] == [BatchStatus.COMMITTED, BatchStatus.RELEASED]
    assert [b.batch_id for b in await client.query_batches(name, status_in=["committed"])] == [batch.batch_id]
    assert [b.batch_id for b in await client.query_batches(name, from_step=2)] == [spare.batch_id]

    await client.stop_training_run(name, "seen enough")
    told = await client.report_metrics(name, epoch, [StepMetrics(step=1, metrics={"reward/mean": 0.5})])
    assert told.status is TrainingRunStatus.STOPPING
    ended = await client.finish_training_run(name, epoch, "stopped")
    assert ended.status is TrainingRunStatus.STOPPED
    assert [run.training_run_id for run in await client.query_training_runs(status_in=["stopped"])] == [name]
    assert await client.get_training_run_by_id(name) == ended
    assert await client.get_training_run_by_id("unknown") is None
    with pytest.raises(NotFound):
        await client.acquire_training_run("unknown", "t")


async def test_watching_a_training_run_ends_with_it(client: StoreClient) -> None:
    made = await client.create_training_run(TrainingRun(training_run_id="tr-mine", algorithm="verl"))
    run = await client.acquire_training_run(made.training_run_id, "t")
    name, epoch = run.training_run_id, run.trainer_epoch
    steps: list[int] = []

    async def watch() -> TrainingRunStatus | None:
        last = None
        async for state, metrics in client.watch_training_run(name):
            last = state.status if state else last
            steps.extend(step.step for step in metrics)
        return last

    await client.report_metrics(name, epoch, [StepMetrics(step=0, metrics={"a": 1.0})])
    watching = asyncio.create_task(watch())
    await eventually(lambda: steps == [0], what="the metrics before")
    await client.report_metrics(name, epoch, [StepMetrics(step=n, metrics={"a": 1.0}) for n in (1, 2)])
    await eventually(lambda: steps == [0, 1, 2], what="the metrics after")
    await client.finish_training_run(name, epoch, "succeeded")
    assert await asyncio.wait_for(watching, 10) is TrainingRunStatus.SUCCEEDED
    assert steps == [0, 1, 2]


async def test_steps_that_a_newer_trainer_reports_again_are_shown_again(client: StoreClient) -> None:
    made = await client.create_training_run(TrainingRun(run_id="default", algorithm="verl"))
    name = made.training_run_id
    seen: list[tuple[int, int]] = []

    async def watch() -> None:
        async for _, metrics in client.watch_training_run(name):
            seen.extend((step.trainer_epoch, step.step) for step in metrics)

    watching = asyncio.create_task(watch())
    for epoch, steps in ((1, (1, 2, 3)), (2, (2, 3))):
        assert (await client.acquire_training_run(name, f"t{epoch}")).trainer_epoch == epoch
        for step in steps:
            await client.report_metrics(name, epoch, [StepMetrics(step=step, metrics={"a": 1.0})])
            await eventually(lambda last=(epoch, step): last in seen, what="the step")
    await client.finish_training_run(name, 2, "succeeded")
    await asyncio.wait_for(watching, 10)
    assert seen == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]


async def test_policy_versions_reach_engines(client: StoreClient) -> None:
    engine = Engine(engine_id="e-1", model="m", endpoint="http://h/v1", engine_version="vllm 0.32.0")
    known = await client.report_engine_state(engine)
    assert (known.engine_id, known.run_id) == ("e-1", "default")
    assert await client.get_policy_version("m") is None
    seen: list[tuple[int, PolicyVersionStatus]] = []

    async def watch() -> None:
        async for change in client.watch_policy_versions("m", engine_id="e-1", include_existing=True):
            seen.extend((version.policy_version, version.status) for version in change.items)

    watching = asyncio.create_task(watch())
    try:

        async def connected() -> bool:
            return any(found.connected for found in await client.query_engines("m"))

        await eventually(connected, what="a connected engine")
        source = WeightSource(rendezvous="h:1", backend="gloo", world_size=2, engine_ids=["e-1"])
        offered = await client.prepare_policy_version("m", 1, source, deadline=30.0)
        assert (offered.status, offered.source) == (PolicyVersionStatus.PREPARING, source)
        await eventually(lambda: (1, PolicyVersionStatus.PREPARING) in seen, what="the offer")
        received = EngineState(engine_id="e-1", policy_version=1, phase=EnginePhase.RECEIVED)
        received.weights_digest = "sha256:1"
        await client.report_engine_state(engine, received)
        committed = await client.commit_policy_version("m", 1, "sha256:1")
        assert committed.status is PolicyVersionStatus.COMMITTED
        assert [state.phase for state in committed.engine_states] == [EnginePhase.RECEIVED]
        await eventually(lambda: (1, PolicyVersionStatus.COMMITTED) in seen, what="the commit")
        await client.prepare_policy_version("m", 2, source)
        aborted = await client.abort_policy_version("m", 2, "not today")
        assert aborted.abort_reason == "not today"
        newest = await client.get_policy_version("m")
        assert newest is not None
        assert newest.policy_version == 1
        assert [version.policy_version for version in await client.query_policy_versions("m")] == [2, 1]
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_run_is_taken_up_by_one_trainer_and_tells_log_and_result(client: StoreClient) -> None:
    changes = client.watch_training_runs(include_existing=True)
    states: list[str] = []

    async def watch() -> None:
        async for change in changes:
            states.extend(run.status.value for run in change.items)
            if states and states[-1] == "succeeded":
                return

    watching = asyncio.create_task(watch())
    made = await client.create_training_run(TrainingRun(algorithm="apo"))
    name = made.training_run_id
    taken = await client.acquire_training_run(name, "one", only_pending=True)
    with pytest.raises(IllegalTransition):
        await client.acquire_training_run(name, "two", only_pending=True)
    await client.report_metrics(name, taken.trainer_epoch, [], log=["first", "second"])
    lines = client.watch_training_log(name)
    assert (await anext(lines)).text == "first"
    second = await anext(lines)
    await client.report_metrics(
        name, taken.trainer_epoch, [StepMetrics(step=1, metrics={"a": 1.0})], log=["third"]
    )
    ended = await client.finish_training_run(
        name, taken.trainer_epoch, "succeeded", result={"prompts": {"p": "text"}}
    )
    assert ended.result == {"prompts": {"p": "text"}}
    assert [line.text async for line in lines] == ["third"]
    # From a number on, as after a reconnect; who watches metrics gets no lines.
    assert [line.text async for line in client.watch_training_log(name, after=second.number)] == ["third"]
    assert [len(steps) async for _, steps in client.watch_training_run(name)] == [1]
    await asyncio.wait_for(watching, 10)
    assert states[-1] == "succeeded"
    assert "running" in states
