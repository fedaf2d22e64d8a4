"""A store in the client's own process: streams, watches, blobs, ends and errors are those of a real one."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from agl_grpc.client import (
    Completion,
    Delivered,
    InvalidRequest,
    LeaseStream,
    RetryPolicy,
    SpanGroup,
    SpanStreamer,
    StoreClient,
    Watched,
)
from agl_grpc.client.filters import rollout_filter
from agl_grpc.model import Rollout, RolloutStatus, Span
from agl_grpc.store.in_process import InProcessStore
from agl_grpc.v1 import store_service_pb2 as pb


@pytest.fixture
async def inside(database: Path | str | None) -> AsyncIterator[InProcessStore]:
    async with await InProcessStore.open(database) as store:
        yield store


async def test_work_is_pushed_and_its_spans_are_streamed(inside: InProcessStore) -> None:
    async with StoreClient(inside) as client:
        ids = [(await client.enqueue_rollout({"n": n})).rollout_id for n in range(40)]
        ended: set[str] = set()

        async def watch() -> None:
            async for change in client.watch_rollouts(include_existing=True):
                ended.update(r.rollout_id for r in change.items if r.status.is_terminal)
                if len(ended) == len(ids):
                    return

        watching = asyncio.create_task(watch())
        async with SpanStreamer(client) as streamer, LeaseStream(client, worker_id="w", credits=4) as stream:
            left = len(ids)
            async for event in stream:
                if isinstance(event, Delivered):
                    lease = event.work.lease
                    spans = [Span.from_attributes(attributes={}, name=str(n)) for n in range(50)]
                    group = SpanGroup(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, spans=spans)
                    assert (await streamer.send(group)).rejected == ()
                    await stream.complete(Completion(lease=lease))
                    stream.grant(1)
                    left -= 1
                    if not left:
                        break
        await asyncio.wait_for(watching, 30)
        done = await client.wait_for_rollouts(rollout_ids=ids, timeout=10)
        assert [rollout.status for rollout in done] == [RolloutStatus.SUCCEEDED] * len(ids)
        assert [span.name for span in await client.query_spans(ids[-1])] == [str(n) for n in range(50)]
        assert len([span async for span in client.export_spans()]) == 50 * len(ids)


async def test_blobs_in_pieces_longer_than_a_pipe(inside: InProcessStore) -> None:
    data = bytes(range(256)) * (20 << 12)  # 20 MiB
    async with StoreClient(inside) as client:
        stored = await client.put_blob(data)
        assert await client.get_blob(stored.digest) == data


async def test_errors_are_the_stores_own(inside: InProcessStore) -> None:
    async with StoreClient(inside) as client:
        with pytest.raises(InvalidRequest, match="rollout_id"):
            await client.enqueue_rollout(1, rollout_id="no spaces please")
        assert await client.get_rollout_by_id("unknown") is None
        waiting = client.bound.store.WaitRollouts(pb.WaitRolloutsRequest(group_ids=["g"]), timeout=0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_that_is_broken_off_leaves_nothing_behind(inside: InProcessStore) -> None:
    async with StoreClient(inside) as client:
        await client.enqueue_rollout(1, rollout_id="a")
        waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=["a"]))
        watch = client.watch_rollouts(include_existing=True)
        assert [r.rollout_id for r in (await anext(watch)).items] == ["a"]
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        call = client.bound.store.WatchRollouts(pb.WatchRolloutsRequest())
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        assert not call.cancel()
        await client.cancel_rollouts(["a"])
        assert [r.status for r in (await _next_items(watch))] == [RolloutStatus.CANCELLED]


async def _next_items(watch: AsyncIterator[Watched[Rollout]]) -> list[Rollout]:
    async for change in watch:
        if change.items:
            return change.items
    raise AssertionError("the watch ended")


async def test_a_store_that_is_closed_ends_its_calls_and_takes_no_more(database: Path | str | None) -> None:
    inside = await InProcessStore.open(database)
    client = StoreClient(inside, retry=RetryPolicy(timeout=5.0))
    await client.enqueue_rollout(1, rollout_id="a")
    waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=["a"]))
    watch = client.watch_rollouts(include_existing=True)
    await anext(watch)
    await inside.close()
    for call in (waiting, _next_items(watch), client.statistics()):
        with pytest.raises(grpc.aio.UsageError, match="was closed"):
            await call
    if isinstance(database, Path):
        async with await InProcessStore.open(database) as again:
            assert await StoreClient(again).get_rollout_by_id("a") is not None


async def test_it_stays_on_its_loop_and_in_its_process(inside: InProcessStore) -> None:
    client = StoreClient(inside)
    with pytest.raises(TypeError, match="cannot leave its process"):
        pickle.dumps(client)
    problems: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(StoreClient(inside).statistics())
        except RuntimeError as error:
            problems.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert "on the event loop that opened it" in str(problems[0])


async def test_a_client_for_another_run_reaches_the_same_store(inside: InProcessStore) -> None:
    async with StoreClient(inside) as client, client.for_run("other") as other:
        await client.create_run("other")
        await other.enqueue_rollout({"n": 1})
        found = await client.query_rollouts(filter=rollout_filter(run_id="other"))
    assert [rollout.input for rollout in found] == [{"n": 1}]
