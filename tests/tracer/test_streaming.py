"""Traces reach a real store: under their own attempts, and on disk when the trace ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agl_grpc.agent import emit_message, emit_reward, find_final_reward, operation
from agl_grpc.client import NotFound, SpanStreamer, StoreClient, SyncStoreClient
from agl_grpc.model import AttemptedRollout
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.tracer import OtelTracer
from tests.support.store_process import StoreProcess


@pytest.fixture
async def client() -> AsyncIterator[StoreClient]:
    server = await StoreServer.start(ServeConfig(port=0, database=None, grace=1.0))
    async with StoreClient(server.address) as made:
        yield made
    await server.stop()


async def test_many_attempts_at_once_arrive_whole(client: StoreClient) -> None:
    tracer = OtelTracer(install_globally=False)
    tracer.init_worker(0, client)

    @operation
    async def turn(number: int) -> int:
        await asyncio.sleep(0)
        emit_message(f"turn {number}")
        return number

    async def attempt(number: int) -> AttemptedRollout:
        rollout = await client.start_rollout(number)
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        async with tracer.trace_context("agent", **ids) as trace:
            for place in range(3):
                await turn(place)
            await asyncio.to_thread(emit_reward, number / 10)
        # On disk now, with no further wait.
        stored = await client.query_spans(**ids)
        assert len(stored) == len(trace.spans) == 8
        assert {span.trace_id for span in stored} == {f"{trace.trace_id:032x}"}
        assert find_final_reward(stored) == number / 10
        parents = {span.span_id: span.parent_id for span in stored}
        (root,) = [span for span in stored if span.parent_id is None]
        assert root.name == "agent"
        assert all(parent is None or parent in parents for parent in parents.values())
        return rollout

    rollouts = await asyncio.gather(*map(attempt, range(30)))
    assert (await client.statistics())["total_spans"] == 8 * len(rollouts)
    await tracer.teardown_worker(0)
    tracer.teardown()


async def test_refusals_are_told_at_the_flush(client: StoreClient) -> None:
    async with SpanStreamer(client) as streamer:
        tracer = OtelTracer(streamer, install_globally=False)
        async with tracer.trace_context("agent", rollout_id="ro-x", attempt_id="at-x") as trace:
            emit_message("to nobody")
        rejections = await trace.flush()
    assert rejections
    assert all(isinstance(rejection.error, NotFound) for rejection in rejections)
    tracer.teardown()


async def test_a_span_that_outlives_its_trace_still_arrives(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    async with SpanStreamer(client) as streamer:
        tracer = OtelTracer(streamer, install_globally=False)
        async with tracer.trace_context("agent", **ids) as trace:
            slow = tracer.otel.start_span("slow")
        slow.end()
        assert await trace.flush() == []
    assert [span.name for span in await client.query_spans(**ids)] == ["agent", "slow"]
    tracer.teardown()


def test_agents_on_threads_without_a_loop(tmp_path: Path) -> None:
    tracer = OtelTracer(install_globally=False)
    with StoreProcess(tmp_path / "agl.db") as process, SyncStoreClient(process.address) as client:
        tracer.init_worker(0, client)
        rollout = client.start_rollout(1)
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        with tracer.trace_context("agent", **ids) as trace:
            emit_message("hello")
        assert [span.name for span in client.query_spans(**ids)] == ["agentlightning.message", "agent"]
        assert trace.flush_blocking() == []
        client.io.run(tracer.teardown_worker(0))
    tracer.teardown()


async def test_a_stream_that_has_ended_is_told_at_the_flush_not_to_the_agent(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    streamer = SpanStreamer(client).start()
    tracer = OtelTracer(streamer, install_globally=False)
    ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    done: list[bool] = []

    async def agent() -> None:
        async with tracer.trace_context("agent", **ids):
            await streamer.close()
            emit_message("too late")
            done.append(True)

    with pytest.raises(RuntimeError, match="the SpanStreamer is closed"):
        await agent()
    assert done
    tracer.teardown()
