"""Several servers over one PostgreSQL database serve one fleet (R26)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import psycopg
import pytest

from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.postgres.clock import DatabaseClock
from agl_grpc.v1 import (
    common_pb2,
    resources_pb2,
    store_service_pb2,
    worker_pb2,
)
from tests.store.rig import Rig, WorkerStream, reason, running, seconds
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually

CANCEL = worker_pb2.COMMAND_KIND_CANCEL
RESOURCES = worker_pb2.COMMAND_KIND_RESOURCES


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database without rows."""
    with postgres.lend() as lent:
        yield lent


@pytest.fixture
async def pair(url: str) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two servers over one database, with its clock."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(running(url, DatabaseClock()))
        b = await stack.enter_async_context(running(url, DatabaseClock()))
        yield a, b


async def test_work_enqueued_at_one_is_leased_at_the_other(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    stream = WorkerStream(b)
    await stream.open(granted=2)
    assert await stream.read_idle() == "no work"
    poll = asyncio.ensure_future(b.lease("w2", wait=20, queues=["other"]))
    await a.enqueue(rollout_id="streamed")
    (leased,) = await stream.deliveries(1)
    assert leased.rollout.rollout_id == "streamed"
    await eventually(lambda: waits_in(b, "other"), what="the poll waits")
    await a.enqueue(rollout_id="polled", queue="other")
    (polled,) = await poll
    assert polled.rollout.rollout_id == "polled"
    # Either server takes the result, whoever gave the lease.
    for one in (leased, polled):
        (done,) = await a.complete(one)
        assert not done.HasField("error")
    answer = await b.wait("streamed", "polled", timeout=seconds(10))
    assert answer.complete
    stream.cancel()


async def waits_in(rig: Rig, queue: str) -> bool:
    """Whether somebody waits in a queue of this server."""
    keys = rig.server.store
    found = await keys.read(
        lambda db: db.execute("SELECT queue_key FROM queues WHERE name = ?", (queue,)).fetchone()
    )
    return found is not None


async def test_a_wait_at_one_ends_with_the_work_at_the_other(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    await a.enqueue(rollout_id="r")
    wait = asyncio.ensure_future(b.wait("r", timeout=seconds(20)))
    (leased,) = await a.lease()
    begun = time.monotonic()
    await a.complete(leased)
    assert (await wait).complete
    assert time.monotonic() - begun < 4, "it was told; without that it looks each 5 s"


async def test_a_cancel_at_one_reaches_the_worker_at_the_other_once(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    stream = WorkerStream(b)
    await stream.open(granted=1)
    await a.enqueue(rollout_id="r")
    (leased,) = await stream.deliveries(1)
    assert await a.cancel("r") == ["r"]
    order = (await stream.read()).commands.commands
    assert [(one.kind, one.attempt_id) for one in order] == [(CANCEL, leased.attempt.attempt_id)]
    # What comes next is the next order, not this one again.
    await stream.acknowledge(order[0].command_id)
    await a.store.PublishResources(resources("rs"))
    (told,) = (await stream.read()).commands.commands
    assert (told.kind, told.resources_id) == (RESOURCES, "rs")
    stream.cancel()


def resources(name: str) -> store_service_pb2.PublishResourcesRequest:
    """A publication."""
    return store_service_pb2.PublishResourcesRequest(
        resources_id=name,
        resources=[
            resources_pb2.Resource(name="p", prompt_template=resources_pb2.PromptTemplate(template="hello"))
        ],
    )


async def test_what_one_changes_the_other_knows_at_once(pair: tuple[Rig, Rig]) -> None:
    """Runs, queues, labels and the latest resources are remembered by servers; none decides by old ones."""
    a, b = pair
    for rig in pair:
        await rig.enqueue(rollout_id=f"first-{id(rig)}", queue="q")
        await rig.lease(queues=["q"])
    await a.store.PauseDispatch(store_service_pb2.PauseDispatchRequest(queue="q"))
    await b.enqueue(rollout_id="paused", queue="q")
    assert await b.lease(queues=["q"]) == []
    await b.store.ResumeDispatch(store_service_pb2.ResumeDispatchRequest(queue="q"))
    (leased,) = await a.lease(queues=["q"])
    assert leased.rollout.rollout_id == "paused"
    for version, rig in ((1, a), (2, b), (3, a)):
        await rig.store.PublishResources(resources("rs"))
        for other in pair:
            (made,) = await other.enqueue(queue="idle")
            assert (made.resources_id, made.resources_version) == ("rs", version)
    gpu = common_pb2.Label(key="gpu", value="h100")
    await a.enqueue(rollout_id="labelled", queue="l", labels=[gpu])
    assert await b.lease(queues=["l"], labels=[common_pb2.Label(key="cpu", value="x")]) == []
    (leased,) = await b.lease(queues=["l"], labels=[gpu])
    assert leased.rollout.rollout_id == "labelled"


async def test_news_of_an_older_publication_replace_no_newer_one(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    stream = WorkerStream(a)
    await stream.open(granted=40)
    for version in range(2, 41, 2):
        await b.store.PublishResources(resources("rs"))
        # News of that one are still on their way.
        await a.store.PublishResources(resources("rs"))
        await b.enqueue(rollout_id=f"after-{version}")
        await stream.deliveries(1)  # by now they have come
        (pending,) = (await a.renew()).commands
        assert pending.resources_version == version
    stream.cancel()


async def test_a_server_takes_no_entry_of_its_own_for_news(pair: tuple[Rig, Rig]) -> None:
    """Its follower is told by the commit itself, before the writer can note what it wrote."""
    a, b = pair
    mine: list[EventRow] = []
    others: list[EventRow] = []
    a.server.store.on_news.append(mine.extend)
    b.server.store.on_news.append(others.extend)
    for number in range(200):
        await a.enqueue(rollout_id=str(number))

    async def all_told() -> bool:
        return len({event.ref for event in others}) >= 200

    await eventually(all_told, what="the other server knows each rollout")
    assert mine == []


async def test_a_request_that_both_get_is_carried_out_once(pair: tuple[Rig, Rig]) -> None:
    requests = [
        store_service_pb2.EnqueueRolloutsRequest(request_id=f"same-{i}", rollouts=[{}]) for i in range(20)
    ]
    answers = await asyncio.gather(
        *(rig.store.EnqueueRollouts(request) for request in requests for rig in pair)
    )
    made = [answer.rollouts[0].rollout_id for answer in answers]
    assert made[::2] == made[1::2]
    listed = await pair[0].store.ListRollouts(store_service_pb2.ListRolloutsRequest(page_size=1000))
    assert len(listed.rollouts) == 20


async def test_keys_and_positions_are_given_out_once(pair: tuple[Rig, Rig]) -> None:
    """Both write at once; the log has neither gap nor repeat, and every life ends once."""

    async def live(rig: Rig, other: Rig, name: str) -> None:
        for i in range(15):
            await rig.enqueue(rollout_id=f"{name}-{i}", queue=name)
            (leased,) = await other.lease(name, queues=[name])
            await rig.span(leased.attempt, i + 1)
            (done,) = await rig.complete(leased)
            assert not done.HasField("error"), done

    a, b = pair
    await asyncio.gather(live(a, b, "w1"), live(b, a, "w2"), live(a, a, "w3"), live(b, b, "w4"))
    rows = await a.server.store.read(
        lambda db: db.execute("SELECT position, time FROM events ORDER BY position").fetchall()
    )
    assert [position for position, _ in rows] == list(range(1, len(rows) + 1))
    times = [time for _, time in rows]
    assert times == sorted(times), "the log's times are the database's"
    answer = await b.store.ListRollouts(store_service_pb2.ListRolloutsRequest(page_size=1000))
    assert len(answer.rollouts) == 60
    assert {one.rollout.attempt_count for one in answer.rollouts} == {1}


async def test_a_watch_goes_on_at_the_other_server(pair: tuple[Rig, Rig]) -> None:
    """Without a gap and without a repeat, while both write."""
    a, b = pair
    names = [f"r{i}" for i in range(40)]

    async def write(rig: Rig, some: list[str]) -> None:
        for name in some:
            await rig.enqueue(rollout_id=name)

    first = a.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest())
    cursor = (await first.read()).cursor
    writes = asyncio.gather(write(a, names[::2]), write(b, names[1::2]))
    seen: list[str] = []
    servers = [a, b]
    while len(seen) < len(names):
        while (message := await first.read()).checkpoint:
            pass
        seen += [one.rollout.rollout_id for one in message.rollouts]
        cursor = message.cursor
        # To and fro: each message is read at the other server than the one before.
        first.cancel()
        servers.reverse()
        first = servers[0].store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(cursor=cursor))
    await writes
    assert sorted(seen) == sorted(names)
    first.cancel()


async def test_a_stream_at_one_fences_the_producers_stream_at_the_other(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    started = await a.store.StartRollout(store_service_pb2.StartRolloutRequest())
    attempt = started.rollout.attempt

    async def opened(rig: Rig) -> Any:
        call = rig.store.StreamSpans()
        opening = store_service_pb2.SpanStreamOpen(producer_id="p", resume=True)
        await call.write(store_service_pb2.StreamSpansRequest(open=opening))
        return call, (await call.read()).opened

    def message(sequence: int) -> store_service_pb2.StreamSpansRequest:
        request = store_service_pb2.StreamSpansRequest()
        request.spans.sequence = sequence
        group = request.spans.groups.add(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id)
        group.spans.add(span_id=sequence.to_bytes(8, "big"), trace_id=b"t" * 16, name="step")
        return request

    old, first = await opened(a)
    await old.write(message(1))
    assert (await old.read()).ack.sequence == 1
    new, second = await opened(b)
    assert (second.epoch, second.last_sequence) == (first.epoch + 1, 1)
    await new.write(message(2))
    assert (await new.read()).ack.sequence == 2
    await old.write(message(3))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await old.read()
    assert reason(caught.value) == "STREAM_FENCED"
    new.cancel()


async def test_a_workers_stream_at_one_fences_its_sessions_stream_at_the_other(pair: tuple[Rig, Rig]) -> None:
    a, b = pair
    stale, other = WorkerStream(a), WorkerStream(a)
    await stale.open(granted=5)
    assert await stale.read_idle() == "no work"
    # The worker has come back to the other server; this one has not noticed that its connection is gone.
    fresh = WorkerStream(b)
    await fresh.open(granted=1)
    assert await fresh.read_idle() == "no work"
    await a.enqueue(rollout_id="first")
    (leased,) = await fresh.deliveries(1)
    assert leased.rollout.rollout_id == "first"
    with pytest.raises(grpc.aio.AioRpcError) as fenced:
        await stale.read()
    assert fenced.value.code() == grpc.StatusCode.ABORTED
    # Another session, as of a second process under the worker's name, is nobody's rival.
    await other.open(session="s2", granted=1)
    await b.enqueue(rollout_id="second")
    (leased,) = await other.deliveries(1)
    await fresh.grant(2)
    await a.enqueue(rollout_id="third")
    (leased,) = await fresh.deliveries(1)
    assert leased.rollout.rollout_id == "third"
    for stream in (fresh, other):
        stream.cancel()


async def test_timers_of_one_fire_when_the_other_is_gone(url: str) -> None:
    async with running(url, DatabaseClock()) as b:
        async with running(url, DatabaseClock()) as a:
            await a.enqueue(rollout_id="r", config={"max_redeliveries": 0})
            await a.lease(lease_duration=seconds(1))
        answer = await b.wait("r", timeout=seconds(20))
        assert answer.complete
        assert await b.status("r") == "failed"


def nobody_connected(url: str) -> bool:
    """Whether only this look itself has the database open: PostgreSQL ends connections a little later."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    return row == (0,)


async def test_a_second_server_extends_no_lease(url: str) -> None:
    """R9: only who takes the database up after a gap does; a neighbour that lives renewed what it could."""

    async def expiry(rig: Rig) -> int:
        leases = (await rig.store.ListLeases(store_service_pb2.ListLeasesRequest())).leases
        return leases[0].expire_time.ToMicroseconds()

    async with running(url, DatabaseClock()) as a:
        await a.enqueue(rollout_id="r")
        await a.lease(lease_duration=seconds(30))
        before = await expiry(a)
        async with running(url, DatabaseClock()) as b:
            assert await expiry(b) == before
    await eventually(lambda: nobody_connected(url), what="the end of both servers' connections")
    async with running(url, DatabaseClock()) as alone:
        assert await expiry(alone) > before
