"""Traces reach a real store: under their own attempts, and on disk when the trace ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry import trace as otel_api
from opentelemetry.trace import Span

from agl_grpc.agent import emit_message, emit_reward, find_final_reward, operation, rollout
from agl_grpc.client import NotFound, SpanStreamer, StoreClient, SyncStoreClient
from agl_grpc.model import AttemptedRollout, NamedResources
from agl_grpc.runner import LitAgentRunner
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.tracer import OtelTracer, Trace
from agl_grpc.v1 import span_pb2
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually


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


async def test_the_users_own_spans_arrive_under_their_attempt(client: StoreClient) -> None:
    """By the plain OpenTelemetry API, from tasks and from threads, with many rollouts at once."""
    tracer = OtelTracer()
    tracer.init_worker(0, client)
    user = otel_api.get_tracer("the user's library")

    def in_thread(name: str) -> None:
        with user.start_as_current_span(name):
            user.start_span("inside").end()

    async def in_task(name: str) -> None:
        with user.start_as_current_span(name):
            await asyncio.sleep(0)

    async def attempt(number: int) -> tuple[dict[str, str], list[str]]:
        rollout = await client.start_rollout(number)
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        async with tracer.trace_context("agent", **ids):
            await asyncio.gather(*(in_task(f"task {number}") for _ in range(3)))
            await asyncio.to_thread(in_thread, f"worker thread {number}")
            carried = contextvars.copy_context()
            thread = threading.Thread(target=carried.run, args=(in_thread, f"thread {number}"))
            thread.start()
            await asyncio.to_thread(thread.join)
            with user.start_as_current_span(f"parent {number}"), user.start_as_current_span("child"):
                emit_message(str(number))
        names = [f"task {number}"] * 3 + [f"worker thread {number}", "inside", f"thread {number}", "inside"]
        return ids, [*names, f"parent {number}", "child", "agentlightning.message", "agent"]

    for ids, names in await asyncio.gather(*map(attempt, range(12))):
        stored = await client.query_spans(**ids)
        assert sorted(span.name for span in stored) == sorted(names)
        by_id = {span.span_id: span for span in stored}
        (message,) = [span for span in stored if span.name == "agentlightning.message"]
        child = by_id[message.parent_id or ""]
        assert child.name == "child"
        assert by_id[child.parent_id or ""].name.startswith("parent ")
    await tracer.teardown_worker(0)
    tracer.teardown()


async def test_rewards_for_steps_and_spans_are_stored_as_such(client: StoreClient) -> None:
    @rollout
    async def agent(task: int, resources: NamedResources) -> None:
        with operation(name="search") as search:
            emit_reward(0.25, target=search)
        emit_reward(0.5, step=1, name="format")
        emit_reward(1.0)

    async with LitAgentRunner().run_context(agent=agent, store=client) as runner:
        done = await runner.step(1)
    (search,) = [s for s in await client.query_spans(done.rollout_id) if s.name == "agentlightning.operation"]
    rewards = await client.query_rewards([done.rollout_id])
    assert {(r.name, r.step, r.target_span_id): r.value for r in rewards} == {
        ("primary", None, search.span_id): 0.25,
        ("format", 1, None): 0.5,
        ("primary", None, None): 1.0,
    }


async def test_the_end_of_a_trace_may_be_left_to_its_caller(client: StoreClient) -> None:
    tracer = OtelTracer(install_globally=False)
    tracer.init_worker(0, client)

    async def attempt(*, fails: bool) -> tuple[list[str], list[str]]:
        rollout = await client.start_rollout(0)
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        with contextlib.suppress(ZeroDivisionError):
            async with tracer.trace_context("agent", **ids) as trace:
                emit_message("early")
                await trace.flush()
                trace.keep_end()
                emit_message("last")
                if fails:
                    raise ZeroDivisionError
        kept = [span_pb2.Span.FromString(data).name for data in trace.kept]
        return [span.name for span in await client.query_spans(rollout.rollout_id)], kept

    stored, kept = await attempt(fails=False)
    assert len(stored + kept) == 3
    assert kept[-1] == "agent", "the root ends last"
    stored, kept = await attempt(fails=True)
    assert (len(stored), kept) == (3, [])
    await tracer.teardown_worker(0)


async def test_refusals_are_told_at_the_flush(client: StoreClient) -> None:
    async with SpanStreamer(client) as streamer:
        tracer = OtelTracer(streamer, install_globally=False)
        async with tracer.trace_context("agent", rollout_id="ro-x", attempt_id="at-x") as trace:
            emit_message("to nobody")
        rejections = await trace.flush()
    assert rejections
    assert all(isinstance(rejection.error, NotFound) for rejection in rejections)
    tracer.teardown()


async def test_spans_that_outlive_their_trace_still_arrive(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    async with SpanStreamer(client) as streamer:
        tracer = OtelTracer(streamer, install_globally=False)

        async def attempt() -> tuple[weakref.ref[Trace], Span]:
            async with tracer.trace_context("agent", **ids) as trace:
                slow, slower = tracer.otel.start_span("slow"), tracer.otel.start_span("slower")
            slow.end()
            assert await trace.flush() == []
            return weakref.ref(trace), slower

        # In tasks of their own, with which the contexts of the traces end; the stream may hold the last one.
        ended, slower = await asyncio.create_task(attempt())
        for _ in range(3):
            await asyncio.create_task(attempt())
        await eventually(lambda: gc.collect() >= 0 and ended() is None, what="the trace is forgotten")
        slower.end()
        await tracer.teardown_worker(0)
    names = [span.name for span in await client.query_spans(**ids)]
    assert names == ["agent", "slow"] * 4 + ["slower"]
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
