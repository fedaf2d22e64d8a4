"""The lease stream: credits, reconnecting sessions, commands, drain (R12)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from agl_grpc.v1 import (
    common_pb2,
    resources_pb2,
    rollout_pb2,
    runner_service_pb2,
    store_service_pb2,
    worker_pb2,
)
from tests.store.rig import Rig, WorkerStream, held, reason, running
from tests.support.waiting import eventually


async def test_credits_are_cumulative_and_each_delivery_uses_one(rig: Rig) -> None:
    await rig.enqueue(*[rollout_pb2.RolloutSpec(rollout_id=f"r{i}") for i in range(5)])
    stream = WorkerStream(rig)
    await stream.open(granted=2)
    first = await stream.deliveries(2)
    assert [one.rollout.rollout_id for one in first] == ["r0", "r1"]
    await stream.grant(2)
    await stream.grant(4)
    second = await stream.deliveries(2)
    assert [one.rollout.rollout_id for one in second] == ["r2", "r3"]
    assert await rig.status("r4") == "queuing"
    await stream.done()


async def test_a_new_rollout_is_leased_in_the_transaction_that_makes_it(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=1)
    assert await stream.read_idle() == "no work"
    await rig.enqueue(rollout_id="r")
    assert await rig.status("r") == "preparing", "before the enqueue was answered"
    (leased,) = await stream.deliveries(1)
    assert leased.attempt.leased
    await stream.done()


async def test_priority_then_age(rig: Rig) -> None:
    for name, priority in (("low", -1), ("first", 5), ("second", 5), ("mid", 0)):
        await rig.enqueue(rollout_id=name, priority=priority)
    got = await rig.lease(limit=4)
    assert [one.rollout.rollout_id for one in got] == ["first", "second", "mid", "low"]


async def test_queues_and_labels_find_their_workers(rig: Rig) -> None:
    gpu = [common_pb2.Label(key="gpu", value="h100")]
    await rig.enqueue(rollout_id="plain")
    await rig.enqueue(rollout_id="gpu", labels=gpu)
    await rig.enqueue(rollout_id="other", queue="other")
    cpu = [common_pb2.Label(key="cpu", value="arm")]
    assert [one.rollout.rollout_id for one in await rig.lease(limit=9, labels=cpu)] == ["plain"]
    assert [one.rollout.rollout_id for one in await rig.lease(limit=9, labels=cpu + gpu)] == ["gpu"]
    assert [one.rollout.rollout_id for one in await rig.lease(limit=9, queues=["other"])] == ["other"]
    stream = WorkerStream(rig)
    work = runner_service_pb2.WorkRequest(queues=["other", "x"], labels=cpu)
    await stream.open(worker="w2", granted=2, work=work)
    await rig.enqueue(rollout_id="no", queue="other", labels=gpu)
    await rig.enqueue(rollout_id="yes", queue="x")
    (leased,) = await stream.deliveries(1)
    assert leased.rollout.rollout_id == "yes"
    assert await rig.status("no") == "queuing"
    await stream.done()


async def test_work_is_spread_over_waiting_workers(rig: Rig) -> None:
    streams = [WorkerStream(rig) for _ in range(4)]
    for i, stream in enumerate(streams):
        await stream.open(worker=f"w{i}", granted=4)
    await rig.enqueue(*[rollout_pb2.RolloutSpec() for _ in range(8)])
    for stream in streams:
        await stream.deliveries(2)
    for stream in streams:
        await stream.done()


async def test_a_session_that_comes_back_keeps_what_it_names(rig: Rig) -> None:
    await rig.enqueue(*[rollout_pb2.RolloutSpec(rollout_id=f"r{i}") for i in range(3)])
    stream = WorkerStream(rig)
    await stream.open(granted=3)
    leased = await stream.deliveries(3)
    stream.cancel()
    again = WorkerStream(rig)
    await rig.complete(leased[2])
    opened = await again.open(held=[held(leased[0]), held(leased[2])])
    assert list(opened.lost_attempt_ids) == [leased[2].attempt.attempt_id]
    assert list(opened.released_attempt_ids) == [leased[1].attempt.attempt_id]
    assert await rig.status("r0") == "preparing"
    assert await rig.status("r1") == "requeuing"
    (done,) = await rig.complete(leased[0])
    assert not done.HasField("error")
    await again.done()


async def test_another_session_of_the_worker_releases_nothing(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    first, second = WorkerStream(rig), WorkerStream(rig)
    await first.open(session="one", granted=1)
    (leased,) = await first.deliveries(1)
    opened = await second.open(session="two")
    assert not opened.released_attempt_ids
    (done,) = await rig.complete(leased)
    assert not done.HasField("error")
    await first.done()
    await second.done()


async def test_a_newer_stream_of_the_session_fences_the_older(rig: Rig) -> None:
    older, newer = WorkerStream(rig), WorkerStream(rig)
    await older.open(granted=5)
    await newer.open(granted=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await older.read()
    assert reason(caught.value) == "STREAM_FENCED"
    await rig.enqueue(rollout_id="a")
    await newer.deliveries(1)
    await rig.enqueue(rollout_id="b")
    assert await rig.status("b") == "queuing", "the older stream's credits are void"
    await newer.done()


async def test_cancel_reaches_a_connected_worker_at_once_and_until_acknowledged(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    stream = WorkerStream(rig)
    await stream.open(granted=1)
    (leased,) = await stream.deliveries(1)
    begun = time.monotonic()
    assert await rig.cancel("r") == ["r"]
    message = await stream.read()
    assert time.monotonic() - begun < 1.0
    (command,) = message.commands.commands
    assert (command.kind, command.rollout_id) == (worker_pb2.COMMAND_KIND_CANCEL, "r")
    assert command.attempt_id == leased.attempt.attempt_id
    assert command.reason == "enough"
    assert (await rig.renew()).commands[0].command_id == command.command_id, "repeated"
    await stream.acknowledge(command.command_id)

    async def forgotten() -> bool:
        return not (await rig.renew()).commands

    await eventually(forgotten, what="the acknowledged command is forgotten")
    (refused,) = await rig.complete(leased)
    assert refused.error.code == 9
    assert await rig.status("r") == "cancelled"
    await stream.done()


async def test_commands_wait_for_a_worker_that_is_away(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    stream = WorkerStream(rig)
    await stream.open(granted=1)
    (leased,) = await stream.deliveries(1)
    stream.cancel()
    await rig.cancel("r")
    again = WorkerStream(rig)
    opened = await again.open(held=[held(leased)])
    assert list(opened.lost_attempt_ids) == [leased.attempt.attempt_id]
    message = await again.read()
    assert message.commands.commands[0].attempt_id == leased.attempt.attempt_id
    await again.done()
    fresh = WorkerStream(rig)
    await fresh.open(session="another process")
    assert not (await rig.renew()).commands, "a new process has nothing to stop"
    await fresh.done()


async def test_pause_and_resume(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=3)
    assert await stream.read_idle() == "no work"
    run = (await rig.store.PauseDispatch(store_service_pb2.PauseDispatchRequest())).run
    assert run.paused
    assert await stream.read_idle() == "paused"
    await rig.enqueue(rollout_id="a")
    await rig.enqueue(rollout_id="b")
    assert await rig.lease() == []
    assert await rig.status("a") == "queuing"
    assert not (await rig.store.ResumeDispatch(store_service_pb2.ResumeDispatchRequest())).run.paused
    assert [one.rollout.rollout_id for one in await stream.deliveries(2)] == ["a", "b"]
    request = store_service_pb2.PauseDispatchRequest(queue="q")
    assert list((await rig.store.PauseDispatch(request)).run.paused_queues) == ["q"]
    await rig.enqueue(rollout_id="c", queue="q")
    await rig.enqueue(rollout_id="d")
    assert [one.rollout.rollout_id for one in await stream.deliveries(1)] == ["d"]
    assert await rig.lease(queues=["q"]) == []
    await stream.done()


async def test_a_draining_worker_gets_nothing_new(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=5)
    await rig.enqueue(rollout_id="a")
    (leased,) = await stream.deliveries(1)
    await stream.drain()

    async def passed_by() -> bool:
        (made,) = await rig.enqueue()
        return await rig.status(made.rollout_id) == "queuing"

    await eventually(passed_by, what="work stays in its queue")
    (done,) = await rig.complete(leased)
    assert not done.HasField("error")


async def test_a_broken_stream_takes_no_more_work(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=1000)
    stream.cancel()

    async def left_alone() -> bool:
        (made,) = await rig.enqueue()
        return await rig.status(made.rollout_id) == "queuing"

    await eventually(left_alone, what="the waiter of a broken stream is gone")


async def test_long_polls_wait_and_answer_before_the_deadline(rig: Rig) -> None:
    poll = asyncio.ensure_future(rig.lease("poller", limit=8, wait=30))

    async def waiting() -> bool:
        workers = await rig.store.ListWorkers(store_service_pb2.ListWorkersRequest())
        return bool(workers.workers)

    await eventually(waiting, what="the poll waits")
    await rig.enqueue(*[rollout_pb2.RolloutSpec(rollout_id=f"r{i}") for i in range(3)])
    assert [one.rollout.rollout_id for one in await poll] == ["r0", "r1", "r2"], "all of one transaction"
    begun = time.monotonic()
    request = runner_service_pb2.LeaseRolloutsRequest(worker_id="w", session_id="s", wait={"seconds": 30})
    answer = await rig.runner.LeaseRollouts(request, timeout=1.0)
    assert not answer.rollouts
    assert time.monotonic() - begun < 1.0
    await rig.enqueue(rollout_id="later")
    assert await rig.status("later") == "queuing", "a poll that is over takes nothing"


async def test_a_poll_whose_caller_left_takes_nothing(rig: Rig) -> None:
    poll = asyncio.ensure_future(rig.lease("poller", wait=30))

    async def waiting() -> bool:
        workers = await rig.store.ListWorkers(store_service_pb2.ListWorkersRequest())
        return bool(workers.workers)

    await eventually(waiting, what="the poll waits")
    poll.cancel()

    async def left_alone() -> bool:
        (made,) = await rig.enqueue()
        return await rig.status(made.rollout_id) in ("queuing", "requeuing")

    await eventually(left_alone, what="the poll is gone")


async def test_a_server_that_drains_says_so(database: Path | str | None) -> None:
    async with running(database) as rig:
        stream = WorkerStream(rig)
        await stream.open(granted=1)
        assert await stream.read_idle() == "no work"
        stopping = asyncio.ensure_future(rig.server.stop())
        message = await stream.read()
        assert message.HasField("drain")
        assert await stream.read() is None
        await stopping


@pytest.mark.parametrize(
    ("opening", "field"),
    [
        ({"worker_id": ""}, "worker_id"),
        ({"worker_id": "w", "granted": -1}, "open.granted"),
        ({"worker_id": "w", "work": {"lease_duration": {"seconds": 4000}}}, "work.lease_duration"),
    ],
)
async def test_bad_openings_are_named(rig: Rig, opening: dict[str, object], field: str) -> None:
    call = rig.runner.StreamLeases()
    await call.write(runner_service_pb2.StreamLeasesRequest(open=opening))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")


async def test_an_unknown_run_is_named(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.lease(run_id="nowhere")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "nowhere" in (caught.value.details() or "")


async def test_new_resources_are_announced_to_connected_workers(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=1)
    await rig.enqueue(rollout_id="before")
    await stream.deliveries(1)
    for _ in range(2):
        resource = resources_pb2.Resource(name="prompt", prompt_template={"template": "hello"})
        request = store_service_pb2.PublishResourcesRequest(resources=[resource], resources_id="rs")
        await rig.store.PublishResources(request)
    told: list[tuple[int, str, int]] = []
    while not told or told[-1][2] < 2:  # until it is acknowledged a command may come again
        commands = (await stream.read()).commands.commands
        told += [(each.kind, each.resources_id, each.resources_version) for each in commands]
    assert set(told) == {(worker_pb2.COMMAND_KIND_RESOURCES, "rs", version) for version in (1, 2)}
    assert len((await rig.renew()).commands) == 1, "the newer announcement replaces the older"
    await stream.grant(2)
    await rig.enqueue(rollout_id="after")
    (leased,) = await stream.deliveries(1)
    assert leased.resources.version == 2
    await stream.done()
