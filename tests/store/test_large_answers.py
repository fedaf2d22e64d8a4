"""Answers that have no pages stay below the size of a message, and nothing is left behind because of it."""

from __future__ import annotations

import os
from typing import Any

import grpc
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.store import limits
from agl_grpc.v1 import common_pb2, resources_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from tests.store.rig import SUCCEEDED, Rig, WorkerStream, held, running

COUNT = 60
ONE = common_pb2.Payload(media_type="application/octet-stream", data=os.urandom(limits.PAYLOAD_BYTES))


async def enqueue_large(rig: Rig) -> list[str]:
    """Sixty inputs of a MiB each, in two calls: both answers come without what the caller has."""
    ids = [f"r{number:02}" for number in range(COUNT)]
    for part in (ids[: COUNT // 2], ids[COUNT // 2 :]):
        await rig.enqueue(*[rollout_pb2.RolloutSpec(rollout_id=one, input=ONE, group_id="g") for one in part])
    return ids


async def test_large_work_is_leased_waited_for_tried_again_and_watched() -> None:
    async with running(None) as rig:
        ids = await enqueue_large(rig)
        leased: list[Any] = []
        while len(leased) < COUNT:
            some = await rig.lease(limit=COUNT)
            assert 0 < len(some) <= limits.LARGE_ANSWER_BYTES // limits.PAYLOAD_BYTES + 1
            leased += some
        assert [one.rollout.rollout_id for one in leased] == ids
        assert all(one.rollout.input == ONE for one in leased)
        done = await rig.complete(*leased)
        assert [one.rollout.rollout_id for one in done] == ids
        assert not any(one.rollout.HasField("input") for one in done)
        # A wait by group, and what does not fit into its answer.
        waited = await rig.wait(group_ids=["g"])
        shown = [one.rollout_id for one in waited.rollouts]
        assert waited.complete
        assert shown + list(waited.further_rollout_ids) == ids
        assert waited.further_rollout_ids
        async with StoreClient(rig.server.address) as client:
            found = await client.wait_for_rollouts(group_ids=["g"], timeout=0)
            assert [(one.rollout_id, one.input) for one in found] == [(one, ONE.data) for one in ids]
        again = await rig.store.RetryRollouts(store_service_pb2.RetryRolloutsRequest())
        assert [one.retry_of for one in again.rollouts] == ids
        watched: list[str] = []
        watch = store_service_pb2.WatchRolloutsRequest(include_existing=True)
        async for page in rig.store.WatchRollouts(watch):
            watched += [one.rollout.rollout_id for one in page.rollouts]
            if page.checkpoint:
                break
        assert sorted(watched) == sorted([*ids, *(one.rollout_id for one in again.rollouts)])


async def test_a_stream_gets_large_work_as_fast_as_it_takes_it() -> None:
    async with running(None) as rig:
        await stream_large_work(rig)


async def stream_large_work(rig: Rig) -> None:
    stream = WorkerStream(rig)
    await stream.open(granted=COUNT + 5)
    ids = await enqueue_large(rig)
    leased = await stream.deliveries(COUNT)
    assert [one.rollout.rollout_id for one in leased] == ids
    await rig.enqueue(rollout_id="more")
    (more,) = await stream.deliveries(1)
    assert more.rollout.rollout_id == "more"
    (ended,) = await rig.complete(more, status=SUCCEEDED)
    assert not ended.HasField("error")
    await stream.done()
    release = runner_service_pb2.ReleaseAttemptsRequest(worker_id="w1", leases=map(held, leased))
    assert not any(one.HasField("error") for one in (await rig.runner.ReleaseAttempts(release)).results)


async def test_resources_that_could_not_go_with_a_delivery_are_refused(rig: Rig) -> None:
    request = store_service_pb2.PublishResourcesRequest()
    for number in range(18):
        field = common_pb2.KeyValue(key="data")
        field.value.bytes_value = b"x" * (1 << 19)
        custom = resources_pb2.CustomResource(resource_type="weights", fields=[field])
        request.resources.append(resources_pb2.Resource(name=f"part-{number}", custom=custom))
    with pytest.raises(grpc.aio.AioRpcError, match="8388608 are taken"):
        await rig.store.PublishResources(request)
    del request.resources[14:]
    assert (await rig.store.PublishResources(request)).resources.version == 1
