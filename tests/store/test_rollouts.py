"""Runs, rollouts, attempts through the wire: made, found, changed, cancelled, deleted (R1-R5, R13, R22)."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from agl_grpc.store.clock import SECOND
from agl_grpc.v1 import attempt_pb2, common_pb2, resources_pb2, rollout_pb2, run_pb2, store_service_pb2
from tests.store.rig import FAILED, SUCCEEDED, Rig, reason, seconds

Spec = rollout_pb2.RolloutSpec


async def listed(rig: Rig, **fields: Any) -> list[str]:
    """Ids of rollouts by filter, in order of creation."""
    request = store_service_pb2.ListRolloutsRequest(filter=rollout_pb2.RolloutFilter(**fields))
    answer = await rig.store.ListRollouts(request)
    return [one.rollout.rollout_id for one in answer.rollouts]


async def test_runs_are_made_found_and_changed(rig: Rig) -> None:
    wanted = run_pb2.Run(run_id="mine", seal_timeout=seconds(5))
    made = await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=wanted))
    assert made.created
    assert made.run.seal_timeout.seconds == 5
    again = await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="mine")))
    assert not again.created
    assert again.run == made.run
    update = store_service_pb2.UpdateRunRequest(run=run_pb2.Run(run_id="mine", allow_self_grading=True))
    update.update_mask.paths.append("allow_self_grading")
    changed = (await rig.store.UpdateRun(update)).run
    assert changed.allow_self_grading
    assert changed.seal_timeout.seconds == 5
    runs = (await rig.store.ListRuns(store_service_pb2.ListRunsRequest())).runs
    assert [run.run_id for run in runs] == ["default", "mine"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.GetRun(store_service_pb2.GetRunRequest(run_id="unknown"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "ENTITY_NOT_FOUND"


async def test_runs_are_apart(rig: Rig) -> None:
    await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="b")))
    await rig.enqueue(rollout_id="in-default")
    await rig.enqueue(rollout_id="in-b", run_id="b")
    assert await listed(rig) == ["in-default"]
    assert await listed(rig, run_id="b") == ["in-b"]
    assert await listed(rig, run_id="*") == ["in-default", "in-b"]
    assert [one.rollout.rollout_id for one in await rig.lease(limit=9, run_id="b")] == ["in-b"]
    statistics = await rig.store.GetStatistics(store_service_pb2.GetStatisticsRequest(run_id="b"))
    assert statistics.total_rollouts == 1
    assert {one.status: one.count for one in statistics.rollouts_by_status} == {"preparing": 1}


async def test_enqueue_is_all_or_none(rig: Rig) -> None:
    await rig.enqueue(rollout_id="taken")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.enqueue(Spec(rollout_id="new"), Spec(rollout_id="taken"))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(grpc.aio.AioRpcError):
        await rig.enqueue(Spec(rollout_id="twice"), Spec(rollout_id="twice"))
    assert await listed(rig) == ["taken"]
    assert await rig.store.EnqueueRollouts(store_service_pb2.EnqueueRolloutsRequest()) is not None


async def test_a_repeated_enqueue_is_one_enqueue(rig: Rig) -> None:
    request = store_service_pb2.EnqueueRolloutsRequest(
        request_id="q", rollouts=[Spec(), Spec(rollout_id="x")]
    )
    first = await rig.store.EnqueueRollouts(request)
    assert await rig.store.EnqueueRollouts(request) == first
    assert len(await listed(rig)) == 2
    request.rollouts.add()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.EnqueueRollouts(request)
    assert reason(caught.value) == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"rollout_id": "no spaces"}, "rollouts[0].rollout_id"),
        ({"rollout_id": "x" * 129}, "rollouts[0].rollout_id"),
        ({"priority": 1001}, "rollouts[0].priority"),
        ({"input": {"data": b"x" * ((1 << 20) + 512)}}, "rollouts[0].input"),
        ({"config": {"max_attempts": -1}}, "rollouts[0].config.max_attempts"),
        ({"config": {"max_redeliveries": 1001}}, "rollouts[0].config.max_redeliveries"),
        ({"config": {"timeout": {"seconds": 0}}}, "rollouts[0].config.timeout"),
        ({"config": {"retry_condition": [SUCCEEDED]}}, "rollouts[0].config.retry_condition"),
        ({"expire_after": {"seconds": -1}}, "rollouts[0].expire_after"),
        ({"labels": [{"key": ""}]}, "rollouts[0].labels"),
        ({"group_id": "g" * 129}, "rollouts[0].group_id"),
        ({"resources_version": 2}, "rollouts[0].resources_version"),
    ],
)
async def test_bad_specs_are_named(rig: Rig, spec: dict[str, Any], path: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.enqueue(Spec(**spec))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(path)


async def test_filters(rig: Rig) -> None:
    label = [common_pb2.Label(key="k", value="v")]
    await rig.enqueue(Spec(rollout_id="a", group_id="g", mode=rollout_pb2.ROLLOUT_MODE_TRAIN, labels=label))
    await rig.advance(10)
    await rig.enqueue(Spec(rollout_id="b", queue="q"), Spec(rollout_id="bb", group_id="g"))
    (leased,) = await rig.lease(queues=["q"])
    await rig.complete(leased, status=FAILED, failure={"kind": attempt_pb2.FAILURE_KIND_GRADER})
    assert await listed(rig, group_id_in=["g"]) == ["a", "bb"]
    assert await listed(rig, queue_in=["q"]) == ["b"]
    assert await listed(rig, labels=label) == ["a"]
    assert await listed(rig, mode_in=[rollout_pb2.ROLLOUT_MODE_TRAIN]) == ["a"]
    assert await listed(rig, rollout_id_contains="b") == ["b", "bb"]
    assert await listed(rig, rollout_id_in=["a", "nowhere"]) == ["a"]
    assert await listed(rig, failure_kind_in=[attempt_pb2.FAILURE_KIND_GRADER]) == ["b"]
    assert await listed(rig, status_in=[rollout_pb2.ROLLOUT_STATUS_FAILED]) == ["b"]
    both = {"group_id_in": ["g"], "rollout_id_contains": "b"}
    assert await listed(rig, **both) == ["bb"]
    assert await listed(rig, **both, logic=common_pb2.FILTER_LOGIC_OR) == ["a", "b", "bb"]
    middle = timestamp_pb2.Timestamp(seconds=rig.clock.now() // SECOND - 5)
    assert await listed(rig, create_time_before=middle) == ["a"]
    assert await listed(rig, create_time_after=middle) == ["b", "bb"]


async def test_pages_do_not_drift(rig: Rig) -> None:
    await rig.enqueue(*[Spec(rollout_id=f"r{i}", priority=i % 3) for i in range(7)])
    request = store_service_pb2.ListRolloutsRequest(
        page_size=3, order_by="priority", order=common_pb2.SORT_ORDER_DESCENDING, include_total=True
    )
    first = await rig.store.ListRollouts(request)
    assert first.total_size == 7
    seen = [one.rollout.rollout_id for one in first.rollouts]
    await rig.enqueue(rollout_id="late", priority=1000)
    token = first.next_page_token
    while token:
        request.page_token = token
        page = await rig.store.ListRollouts(request)
        seen += [one.rollout.rollout_id for one in page.rollouts]
        token = page.next_page_token
    assert seen == ["r5", "r2", "r4", "r1", "r6", "r3", "r0"]
    request.order_by = "rollout_id"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.ListRollouts(request)
    assert reason(caught.value) == "PAGE_TOKEN_INVALID"
    for bad in ({"page_size": -1}, {"order_by": "colour"}, {"page_token": "?"}, {"skip": -1}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.store.ListRollouts(store_service_pb2.ListRolloutsRequest(**bad))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    skipped = await rig.store.ListRollouts(store_service_pb2.ListRolloutsRequest(skip=6))
    assert [one.rollout.rollout_id for one in skipped.rollouts] == ["r6", "late"]


async def test_not_before_and_expire_after(rig: Rig) -> None:
    later = timestamp_pb2.Timestamp(seconds=rig.clock.now() // SECOND + 60)
    await rig.enqueue(rollout_id="later", not_before=later)
    await rig.enqueue(rollout_id="brief", queue="q", expire_after=seconds(30))
    assert await rig.lease() == []
    await rig.advance(31)
    assert await rig.status("brief") == "cancelled"
    assert (await rig.rollout("brief")).rollout.sealed
    await rig.advance(30)
    assert [one.rollout.rollout_id for one in await rig.lease()] == ["later"]


async def test_a_waiting_worker_gets_what_becomes_due(rig: Rig) -> None:
    import asyncio

    later = timestamp_pb2.Timestamp(seconds=rig.clock.now() // SECOND + 60)
    await rig.enqueue(rollout_id="later", not_before=later)
    poll = asyncio.ensure_future(rig.lease(wait=30))
    await rig.advance(61)
    assert [one.rollout.rollout_id for one in await poll] == ["later"]


async def test_resources_bind_at_enqueue_or_at_the_first_lease(rig: Rig) -> None:
    await rig.enqueue(Spec(rollout_id="unbound"))
    first = await publish(rig, "one")
    await rig.enqueue(
        Spec(rollout_id="bound"), Spec(rollout_id="late", binding=rollout_pb2.RESOURCE_BINDING_AT_LEASE)
    )
    second = await publish(rig, "two")
    exact = Spec(rollout_id="exact", resources_id=first.resources_id, resources_version=1)
    await rig.enqueue(exact)
    leased = {one.rollout.rollout_id: one for one in await rig.lease(limit=9)}
    text = {name: one.resources.resources[0].prompt_template.template for name, one in leased.items()}
    assert text == {"unbound": "two", "bound": "one", "late": "two", "exact": "one"}
    assert leased["bound"].attempt.resources_id == first.resources_id
    assert leased["unbound"].rollout.resources_id == second.resources_id
    await publish(rig, "three")
    await rig.advance(31)
    again = {one.rollout.rollout_id: one for one in await rig.lease(limit=9)}
    assert again["unbound"].resources == second, "the binding holds for all attempts"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.enqueue(Spec(resources_id="nowhere"))
    assert reason(caught.value) == "RESOURCE_MISSING"


async def publish(rig: Rig, text: str) -> Any:
    """Publishes a prompt."""
    resource = resources_pb2.Resource(name="prompt", prompt_template={"template": text})
    request = store_service_pb2.PublishResourcesRequest(resources=[resource])
    return (await rig.store.PublishResources(request)).resources


async def update(rig: Rig, rollout_id: str, *paths: str, **fields: Any) -> Any:
    """Updates a rollout."""
    wanted = rollout_pb2.Rollout(rollout_id=rollout_id, **fields)
    request = store_service_pb2.UpdateRolloutRequest(rollout=wanted)
    request.update_mask.paths.extend(paths)
    return (await rig.store.UpdateRollout(request)).rollout


async def test_a_rollout_can_be_changed_by_hand(rig: Rig) -> None:
    await rig.enqueue(Spec(rollout_id="a"), Spec(rollout_id="b"))
    note = [common_pb2.KeyValue(key="n", value={"int_value": 1})]
    changed = await update(rig, "b", "priority", "metadata", priority=9, metadata=note)
    assert changed.priority == 9
    assert changed.metadata[0].value.int_value == 1
    assert [one.rollout.rollout_id for one in await rig.lease()] == ["b"]
    await update(rig, "a", "status", status=rollout_pb2.ROLLOUT_STATUS_SUCCEEDED)
    after = (await rig.rollout("a")).rollout
    assert after.sealed
    assert after.HasField("end_time")
    assert await rig.lease() == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await update(rig, "a", "status", status=rollout_pb2.ROLLOUT_STATUS_QUEUING)
    assert reason(caught.value) == "ILLEGAL_TRANSITION"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await update(rig, "a", "rollout_id")
    assert reason(caught.value) == "INVALID_FIELD"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await update(rig, "nowhere", "priority")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_running_rollout_requeued_by_hand_takes_its_lease_back(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    await update(rig, "a", "status", status=rollout_pb2.ROLLOUT_STATUS_QUEUING)
    (refused,) = await rig.complete(leased)
    assert refused.error.code == 9
    (again,) = await rig.lease("w2")
    assert again.attempt.sequence_id == 2
    await rig.complete(again)
    assert await rig.status("a") == "succeeded"


async def test_a_rollout_finished_by_hand_while_an_attempt_without_lease_goes_on(rig: Rig) -> None:
    started = await rig.store.StartRollout(store_service_pb2.StartRolloutRequest(rollout={"rollout_id": "a"}))
    await update(rig, "a", "status", status=rollout_pb2.ROLLOUT_STATUS_SUCCEEDED)
    assert not (await rig.rollout("a")).rollout.sealed
    await rig.update_attempt(started.rollout.attempt, SUCCEEDED)
    assert (await rig.rollout("a")).rollout.sealed


async def test_cancel_retry_delete(rig: Rig) -> None:
    await rig.enqueue(Spec(rollout_id="queued"), Spec(rollout_id="held", group_id="g", priority=5))
    (leased,) = await rig.lease()
    assert await rig.cancel() == ["queued", "held"]
    assert await rig.cancel() == []
    attempt = (await rig.attempts("held"))[0]
    assert attempt.failure.kind == attempt_pb2.FAILURE_KIND_CANCELLED
    assert attempt.sealed
    (refused,) = await rig.complete(leased)
    assert refused.error.code == 9
    request = store_service_pb2.RetryRolloutsRequest(filter={"rollout_id_in": ["held"]})
    (retried,) = (await rig.store.RetryRollouts(request)).rollouts
    assert retried.retry_of == "held"
    assert (retried.group_id, retried.priority) == ("g", 5)
    assert await rig.status(retried.rollout_id) == "queuing"
    assert not retried.HasField("expire_after")
    await rig.store.CancelRollouts(store_service_pb2.CancelRolloutsRequest(filter={"group_id_in": ["g"]}))
    request.expire_after.CopyFrom(seconds(60))
    (limited,) = (await rig.store.RetryRollouts(request)).rollouts
    again = store_service_pb2.RetryRolloutsRequest(filter={"rollout_id_in": [limited.rollout_id]})
    await rig.cancel(limited.rollout_id)
    (kept,) = (await rig.store.RetryRollouts(again)).rollouts
    assert (limited.expire_after, kept.expire_after) == (seconds(60), seconds(60))
    await rig.store.DeleteRollouts(
        store_service_pb2.DeleteRolloutsRequest(
            filter={"rollout_id_in": [retried.rollout_id, limited.rollout_id]}
        )
    )
    retried = kept
    delete = store_service_pb2.DeleteRolloutsRequest(dry_run=True)
    counted = await rig.store.DeleteRollouts(delete)
    assert (counted.deleted, counted.kept) == (2, 1)
    assert len(await listed(rig)) == 3
    delete.dry_run = False
    done = await rig.store.DeleteRollouts(delete)
    assert (done.deleted, done.kept) == (2, 1)
    assert await listed(rig) == [retried.rollout_id]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.rollout("held")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_attempts_are_found_and_listed(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    none = await rig.store.GetAttempt(
        store_service_pb2.GetAttemptRequest(rollout_id="a", attempt_id="latest")
    )
    assert not none.HasField("attempt")
    for _ in range(2):
        request = store_service_pb2.StartAttemptRequest(rollout_id="a", worker_id="me")
        made = (await rig.store.StartAttempt(request)).rollout.attempt
    latest = store_service_pb2.GetAttemptRequest(rollout_id="a", attempt_id="latest")
    assert (await rig.store.GetAttempt(latest)).attempt == made
    by_id = store_service_pb2.GetAttemptRequest(attempt_id=made.attempt_id)
    assert (await rig.store.GetAttempt(by_id)).attempt.worker_id == "me"
    backwards = store_service_pb2.ListAttemptsRequest(
        rollout_id="a", order=common_pb2.SORT_ORDER_DESCENDING, page_size=1, include_total=True
    )
    page = await rig.store.ListAttempts(backwards)
    assert page.attempts[0].sequence_id == 2
    assert page.total_size == 2
    backwards.page_token = page.next_page_token
    assert (await rig.store.ListAttempts(backwards)).attempts[0].sequence_id == 1
    for wrong in ("nowhere", ""):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.store.GetAttempt(store_service_pb2.GetAttemptRequest(rollout_id="a", attempt_id=wrong))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_workers_are_shown_as_they_are(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease("busy")
    await rig.lease("idle")
    stats = [common_pb2.KeyValue(key="cpu", value={"double_value": 0.5})]
    from agl_grpc.v1 import runner_service_pb2, worker_pb2

    beat = runner_service_pb2.HeartbeatRequest(worker_id="idle", stats=stats, idle_reason="bored")
    assert (await rig.runner.Heartbeat(beat)).worker.heartbeat_stats[0].key == "cpu"
    busy = (await rig.store.GetWorker(store_service_pb2.GetWorkerRequest(worker_id="busy"))).worker
    assert busy.status == worker_pb2.WORKER_STATUS_BUSY
    assert busy.lease_count == 1
    assert busy.current_rollout_id == "a"
    idle = (await rig.store.GetWorker(store_service_pb2.GetWorkerRequest(worker_id="idle"))).worker
    assert (idle.status, idle.idle_reason) == (worker_pb2.WORKER_STATUS_IDLE, "bored")
    only = store_service_pb2.ListWorkersRequest(status_in=[worker_pb2.WORKER_STATUS_BUSY], include_total=True)
    found = await rig.store.ListWorkers(only)
    assert [one.worker_id for one in found.workers] == ["busy"]
    assert found.total_size == 1
    await rig.complete(leased)
    busy = (await rig.store.GetWorker(store_service_pb2.GetWorkerRequest(worker_id="busy"))).worker
    assert busy.status == worker_pb2.WORKER_STATUS_IDLE
    assert busy.HasField("last_idle_time")
    await rig.advance(61)
    silent = (await rig.store.GetWorker(store_service_pb2.GetWorkerRequest(worker_id="idle"))).worker
    assert silent.status == worker_pb2.WORKER_STATUS_UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.GetWorker(store_service_pb2.GetWorkerRequest(worker_id="nobody"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
