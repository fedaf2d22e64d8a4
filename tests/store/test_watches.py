"""Waits and watches: nothing is missed, nothing grows, cursors resume or say that they are too old (R23)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from agl_grpc.store.storage import maintenance
from agl_grpc.v1 import rollout_pb2, span_pb2, store_service_pb2
from tests.store.rig import Rig, reason, running, seconds

SEALED = store_service_pb2.WAIT_UNTIL_SEALED


async def test_a_wait_is_woken_by_the_end(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    await rig.enqueue(rollout_id="b")
    first, second = await rig.lease(limit=2)
    both = asyncio.ensure_future(rig.wait("a", "b", "unknown"))
    either = asyncio.ensure_future(rig.wait("a", "b", any=True))
    await rig.complete(first)
    assert [one.rollout_id for one in (await either).rollouts] == ["a"]
    assert not (await either).complete
    assert not both.done()
    await rig.complete(second)
    assert [one.rollout_id for one in (await both).rollouts] == ["a", "b"]
    assert (await both).complete


async def test_a_wait_answers_before_its_deadline(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    begun = time.monotonic()
    request = store_service_pb2.WaitRolloutsRequest(rollout_ids=["a"])
    answer = await rig.store.WaitRollouts(request, timeout=2.0)
    assert time.monotonic() - begun < 2.0
    assert not answer.rollouts
    assert not answer.complete
    nothing = await rig.wait("unknown")
    assert nothing.complete, "unknown ids are ignored"
    assert not nothing.rollouts


async def test_a_wait_for_a_group_takes_in_later_members(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a", group_id="g")
    (leased,) = await rig.lease()
    wait = asyncio.ensure_future(rig.wait(group_ids=["g", "unknown"]))
    await rig.enqueue(rollout_id="b", group_id="g")
    await rig.complete(leased)
    assert not wait.done()
    (leased,) = await rig.lease()
    await rig.complete(leased)
    answer = await wait
    assert [one.rollout_id for one in answer.rollouts] == ["a", "b"]
    group = (await rig.store.GetGroup(store_service_pb2.GetGroupRequest(group_id="g"))).group
    assert (group.total, group.terminal, group.sealed) == (2, 2, 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.GetGroup(store_service_pb2.GetGroupRequest(group_id="unknown"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def open_call(rig: Rig, attempt: Any, span_id: int) -> None:
    """Announces a model call."""
    request = store_service_pb2.AppendSpansRequest()
    group = request.groups.add(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id)
    begun = rig.clock.now() * 1000
    group.open_calls.append(span_pb2.OpenCall(span_id=span_id.to_bytes(8, "big"), start_time_unix_nano=begun))
    answer = await rig.store.AppendSpans(request)
    assert not answer.rejected


async def test_a_wait_until_sealed_waits_for_open_calls_or_their_timeout(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    await open_call(rig, leased.attempt, 7)
    (done,) = await rig.complete(leased)
    assert not done.rollout.sealed
    assert (await rig.wait("a")).complete
    assert not (await rig.wait("a", until=SEALED, timeout=seconds(0))).complete
    await rig.advance(59)
    assert not (await rig.rollout("a")).rollout.sealed
    wait = asyncio.ensure_future(rig.wait("a", until=SEALED))
    await rig.advance(2)
    assert (await wait).complete
    attempt = (await rig.rollout("a")).attempt
    assert attempt.sealed
    assert attempt.capture_incomplete


async def test_a_watch_sees_every_change_and_resumes(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(include_existing=True))
    existing = await watch.read()
    assert [one.rollout.rollout_id for one in existing.rollouts] == ["a"]
    start = await watch.read()
    assert start.checkpoint
    (leased,) = await rig.lease()
    change = await watch.read()
    assert change.rollouts[0].rollout.status == rollout_pb2.ROLLOUT_STATUS_PREPARING
    watch.cancel()
    await rig.complete(leased)
    await rig.enqueue(rollout_id="b")
    again = rig.store.WatchRollouts(
        store_service_pb2.WatchRolloutsRequest(cursor=change.cursor, include_attempts=True)
    )
    assert (await again.read()).checkpoint
    missed = await again.read()
    assert [one.rollout.rollout_id for one in missed.rollouts] == ["a", "b"]
    assert missed.rollouts[0].attempt.sealed
    await rig.store.DeleteRollouts(store_service_pb2.DeleteRolloutsRequest(filter={"rollout_id_in": ["a"]}))
    gone = await again.read()
    assert list(gone.deleted_rollout_ids) == ["a"]
    again.cancel()


async def test_a_list_and_a_watch_from_its_position_leave_no_gap(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    page = await rig.store.ListRollouts(store_service_pb2.ListRolloutsRequest())
    await rig.enqueue(rollout_id="b")
    watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(cursor=page.position))
    assert (await watch.read()).checkpoint
    assert [one.rollout.rollout_id for one in (await watch.read()).rollouts] == ["b"]
    watch.cancel()


async def test_a_filtered_watch(rig: Rig) -> None:
    request = store_service_pb2.WatchRolloutsRequest(filter={"group_id_in": ["g"]})
    watch = rig.store.WatchRollouts(request)
    assert (await watch.read()).checkpoint
    await rig.enqueue(rollout_id="other")
    await rig.enqueue(rollout_id="mine", group_id="g")
    assert [one.rollout.rollout_id for one in (await watch.read()).rollouts] == ["mine"]
    watch.cancel()


async def test_a_watch_of_attempts(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    await rig.enqueue(rollout_id="b")
    watch = rig.store.WatchAttempts(store_service_pb2.WatchAttemptsRequest(rollout_ids=["b"]))
    assert (await watch.read()).checkpoint
    leased = await rig.lease(limit=2)
    seen = (await watch.read()).attempts
    assert [one.rollout_id for one in seen] == ["b"]
    await rig.complete(*leased)
    seen = (await watch.read()).attempts
    assert seen[0].sealed
    watch.cancel()


async def test_an_old_or_foreign_cursor_is_told(rig: Rig) -> None:
    for i in range(3):
        await rig.enqueue(rollout_id=f"r{i}")
    await rig.advance(25 * 3600)
    await rig.enqueue(rollout_id="new")
    assert await rig.server.store.maintenance.exhaust(maintenance.prune_events) > 0
    for cursor in (1, 10_000):
        watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(cursor=cursor))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert reason(caught.value) == "CURSOR_COMPACTED"


async def test_a_slow_watcher_reads_the_log_and_not_a_buffer(rig: Rig) -> None:
    watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest())
    assert (await watch.read()).checkpoint
    for batch in range(10):
        specs = [rollout_pb2.RolloutSpec(rollout_id=f"r{batch}-{i}") for i in range(200)]
        await rig.enqueue(*specs)
    seen: set[str] = set()
    last = 0
    while len(seen) < 2000:
        answer = await watch.read()
        assert len(answer.rollouts) <= 500
        assert answer.cursor >= last
        last = answer.cursor
        seen.update(one.rollout.rollout_id for one in answer.rollouts)
    watch.cancel()


async def test_a_drain_ends_waits_and_watches(database: Path | str | None) -> None:
    async with running(database) as rig:
        await rig.enqueue(rollout_id="a")
        wait = asyncio.ensure_future(rig.wait("a"))
        watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest())
        assert (await watch.read()).checkpoint
        begun = time.monotonic()
        stopping = asyncio.ensure_future(rig.server.stop())
        assert not (await wait).complete
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value) == "DRAINING"
        await stopping
        assert time.monotonic() - begun < 5
