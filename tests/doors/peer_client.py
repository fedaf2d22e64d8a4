"""Runs in an environment with the released agentlightning 0.3.0: its own client against a store of ours.

Called with the address of the HTTP door. Prints one JSON object at its end; an assertion that fails is the
test's failure.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from agentlightning.store.client_server import LightningStoreClient
from agentlightning.types import (
    LLM,
    EnqueueRolloutRequest,
    PromptTemplate,
    ProxyLLM,
    RolloutConfig,
    Span,
    TraceStatus,
)
from opentelemetry.sdk.trace import TracerProvider


def make_span(rollout_id: str, attempt_id: str, sequence_id: int, **more: object) -> Span:
    """A span as a user makes one by hand."""
    fields: dict = {"attributes": {"step": sequence_id, "texts": ["a", "b"], "share": 0.25, "on": True}}
    fields.update(more)
    return Span.from_attributes(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id,
        start_time=time.time(),
        end_time=time.time() + 0.5,
        **fields,
    )


async def rollouts(store: LightningStoreClient) -> None:
    """Everything about rollouts and attempts."""
    config = RolloutConfig(
        timeout_seconds=60.5, unresponsive_seconds=30, max_attempts=2, retry_condition=["failed", "timeout"]
    )
    one = await store.enqueue_rollout(
        {"question": "1+1", "deep": [1, {"x": None}]}, mode="train", config=config, metadata={"k": [1, "2"]}
    )
    assert one.status == "queuing"
    assert one.mode == "train"
    assert one.config == config
    assert one.input == {"question": "1+1", "deep": [1, {"x": None}]}
    assert one.metadata == {"k": [1, "2"]}
    many = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i, mode="val") for i in range(3)])
    assert [rollout.input for rollout in many] == [0, 1, 2]
    assert list(await store.enqueue_many_rollouts([])) == []

    got = await store.dequeue_rollout(worker_id="Worker-1")
    assert got is not None
    assert got.rollout_id == one.rollout_id
    assert got.status == "preparing"
    assert got.attempt.status == "preparing"
    assert got.attempt.sequence_id == 1
    assert got.attempt.worker_id == "Worker-1"
    rest = await store.dequeue_many_rollouts(limit=10, worker_id="Worker-2")
    assert [rollout.input for rollout in rest] == [0, 1, 2]
    assert await store.dequeue_rollout(worker_id="Worker-3") is None
    idle = await store.get_worker_by_id("Worker-3")
    assert idle is not None
    assert idle.status == "idle"
    assert idle.last_dequeue_time
    assert list(await store.dequeue_many_rollouts(limit=0)) == []

    running = await store.update_attempt(got.rollout_id, got.attempt.attempt_id, status="running")
    assert running.status == "running"
    failed = await store.update_attempt(
        got.rollout_id, "latest", status="failed", metadata={"why": "tired"}, last_heartbeat_time=time.time()
    )
    assert failed.status == "failed"
    assert failed.end_time
    assert failed.metadata == {"why": "tired"}
    again = await store.get_rollout_by_id(got.rollout_id)
    assert again is not None
    assert again.status == "requeuing"
    assert again.attempt.attempt_id == got.attempt.attempt_id
    second = await store.start_attempt(got.rollout_id, worker_id="Worker-1")
    assert second.attempt.sequence_id == 2
    attempts = await store.query_attempts(got.rollout_id)
    assert [attempt.sequence_id for attempt in attempts] == [1, 2]
    assert attempts.total == 2
    newest = await store.query_attempts(got.rollout_id, sort_order="desc", limit=1)
    assert [attempt.sequence_id for attempt in newest] == [2]
    assert newest.total == 2
    latest = await store.get_latest_attempt(got.rollout_id)
    assert latest is not None
    assert latest.attempt_id == second.attempt.attempt_id
    await store.update_attempt(got.rollout_id, "latest", status="succeeded")

    started = await store.start_rollout("now", mode="test", metadata={"a": 1}, worker_id="Worker-9")
    assert started.status == "preparing"
    assert started.attempt.worker_id == "Worker-9"
    changed = await store.update_rollout(started.rollout_id, input="other", mode=None, metadata={"b": 2})
    assert changed.input == "other"
    assert changed.mode is None
    assert changed.metadata == {"b": 2}
    cancelled = await store.update_rollout(started.rollout_id, status="cancelled")
    assert cancelled.status == "cancelled"
    assert cancelled.end_time
    shown = await store.get_latest_attempt(started.rollout_id)
    assert shown is not None
    assert shown.status == "failed"
    assert shown.metadata

    every = await store.query_rollouts()
    assert every.total == 5
    assert len(every) == 5
    assert every.limit == -1
    page = await store.query_rollouts(limit=2, offset=1, sort_by="start_time", sort_order="asc")
    assert len(page) == 2
    assert page.total == 5
    assert page[0].rollout_id == many[0].rollout_id
    by_status = await store.query_rollouts(status_in=["succeeded"])
    assert [rollout.rollout_id for rollout in by_status] == [one.rollout_id]
    assert by_status[0].attempt.sequence_id == 2
    either = await store.query_rollouts(
        status_in=["cancelled"], rollout_id_in=[one.rollout_id], filter_logic="or"
    )
    assert {rollout.rollout_id for rollout in either} == {one.rollout_id, started.rollout_id}
    assert (await store.query_rollouts(rollout_id_contains=one.rollout_id[5:])).total == 1
    assert (await store.query_rollouts(status_in=[])).total == 0
    assert (await store.query_rollouts(rollout_ids=[one.rollout_id])).total == 1

    ended = await store.wait_for_rollouts(
        rollout_ids=[started.rollout_id, one.rollout_id, "ro-none"], timeout=0.05
    )
    assert [rollout.rollout_id for rollout in ended] == [started.rollout_id, one.rollout_id]
    assert await store.wait_for_rollouts(rollout_ids=[many[0].rollout_id], timeout=0) == []

    async def finish_soon() -> None:
        await asyncio.sleep(0.2)
        await store.update_attempt(rest[0].rollout_id, rest[0].attempt.attempt_id, status="succeeded")

    waited, _ = await asyncio.gather(
        store.wait_for_rollouts(rollout_ids=[rest[0].rollout_id], timeout=None), finish_soon()
    )
    assert [rollout.status for rollout in waited] == ["succeeded"]
    assert await store.get_rollout_by_id("ro-none") is None
    assert await store.get_latest_attempt("ro-none") is None
    assert list(await store.query_attempts("ro-none")) == []


async def spans(store: LightningStoreClient) -> None:
    """Everything about spans."""
    rollout = await store.start_rollout({"spans": True}, worker_id="Worker-1")
    key = (rollout.rollout_id, rollout.attempt.attempt_id)
    assert await store.get_next_span_sequence_id(*key) == 1
    assert await store.get_many_span_sequence_ids([key, key]) == [2, 3]
    first = make_span(*key, 1, name="first")
    added = await store.add_span(first)
    assert added is not None
    assert added.model_dump(exclude={"context", "parent"}) == first.model_dump(exclude={"context", "parent"})
    assert await store.add_span(first) is None
    child = make_span(
        *key,
        2,
        name="child",
        trace_id=first.trace_id,
        parent_id=first.span_id,
        status=TraceStatus(status_code="ERROR", description="sad"),
    )
    assert len(await store.add_many_spans([first, child])) == 1
    with TracerProvider().get_tracer("user").start_as_current_span("otel", attributes={"n": 1}) as live:
        live.add_event("thing", {"e": 1})
    otel = await store.add_otel_span(*key, live)
    assert otel is not None
    assert otel.sequence_id == 4
    assert otel.name == "otel"
    assert otel.events[0].name == "thing"
    assert otel.model_extra["kind"]

    found = await store.query_spans(rollout.rollout_id)
    assert [span.name for span in found] == ["first", "child", "otel"]
    assert found.total == 3
    assert found[0].model_dump(exclude={"context", "parent"}) == first.model_dump(
        exclude={"context", "parent"}
    )
    assert found[1].parent_id == first.span_id
    assert found[1].status.description == "sad"
    assert found[2] == otel
    assert [s.name for s in await store.query_spans(rollout.rollout_id, "latest", name_contains="irs")] == [
        "first"
    ]
    assert [s.name for s in await store.query_spans(rollout.rollout_id, parent_id=first.span_id)] == ["child"]
    either = await store.query_spans(
        rollout.rollout_id, span_id=first.span_id, name="otel", filter_logic="or", sort_order="desc"
    )
    assert [span.name for span in either] == ["otel", "first"]
    part = first.trace_id[4:12]
    assert (await store.query_spans(rollout.rollout_id, trace_id_contains=part)).total == 2
    assert [s.name for s in await store.query_spans(rollout.rollout_id, limit=1, offset=1)] == ["child"]
    assert list(await store.query_spans("ro-none")) == []
    running = await store.get_rollout_by_id(rollout.rollout_id)
    assert running is not None
    assert running.status == "running"
    assert running.attempt.last_heartbeat_time


async def resources(store: LightningStoreClient) -> None:
    """Everything about resources."""
    assert await store.get_latest_resources() is None
    assert await store.get_resources_by_id("rs-none") is None
    named = {
        "main_llm": ProxyLLM(endpoint="http://h:1/v1", model="m", sampling_parameters={"temperature": 0.5}),
        "other": LLM(endpoint="http://h:2/v1", model="n", api_key="secret"),
        "prompt": PromptTemplate(template="Say {x}", engine="f-string"),
    }
    first = await store.add_resources(named)
    assert first.version == 1
    assert first.resources["prompt"].format(x="hi") == "Say hi"
    assert (await store.get_latest_resources()) == first
    rollout = await store.enqueue_rollout("bound")
    assert rollout.resources_id == first.resources_id
    second = await store.update_resources(first.resources_id, {"prompt": named["prompt"]})
    assert second.version == 2
    assert second.create_time == first.create_time
    named_id = await store.update_resources("default", {"prompt": named["prompt"]})
    assert named_id.resources_id == "default"
    assert named_id.version == 1
    assert (await store.get_latest_resources()) == named_id
    assert (await store.get_resources_by_id(first.resources_id)) == second
    listed = await store.query_resources(sort_by="resources_id")
    assert {one.resources_id for one in listed} == {first.resources_id, "default"}
    assert listed.total == 2
    assert [one.resources_id for one in await store.query_resources(resources_id_contains="efau")] == [
        "default"
    ]


async def workers(store: LightningStoreClient) -> None:
    """Everything about workers and the store itself."""
    assert await store.get_worker_by_id("nobody") is None
    beat = await store.update_worker("Worker-1", {"cpu": 0.5, "gpu": [{"name": "none"}]})
    assert beat.heartbeat_stats == {"cpu": 0.5, "gpu": [{"name": "none"}]}
    assert beat.last_heartbeat_time
    again = await store.update_worker("Worker-1")
    assert again.heartbeat_stats == beat.heartbeat_stats
    busy = await store.get_worker_by_id("Worker-1")
    assert busy is not None
    assert busy.status == "busy"
    assert busy.current_rollout_id
    listed = await store.query_workers(worker_id_contains="Worker-")
    assert {worker.worker_id for worker in listed} >= {"Worker-1", "Worker-2", "Worker-9"}
    statistics = await store.statistics()
    assert statistics["total_rollouts"] == 7
    assert statistics["total_spans"] == 3


async def main() -> None:
    """All of it, in the order in which later parts count on earlier ones."""
    store = LightningStoreClient(sys.argv[1])
    try:
        for part in (rollouts, spans, resources, workers):
            await part(store)
    finally:
        await store.close()
    print(json.dumps({"passed": 4}))


asyncio.run(main())
