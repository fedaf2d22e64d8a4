"""A worker's side of leases against a real server: credits, renewals, commands, losses, disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from agl_grpc.client import (
    Commanded,
    Completion,
    Connected,
    Delivered,
    Disconnected,
    LeasedRollout,
    LeaseEnded,
    LeaseEvent,
    LeaseLost,
    LeaseStream,
    StoreClient,
)
from agl_grpc.model import CommandKind, EnqueueRolloutRequest, Failure, Reward, RolloutStatus, Span
from agl_grpc.store.door.app import StoreServer
from tests.client.flaky import FlakyProxy
from tests.support.waiting import eventually

E = TypeVar("E")
T = TypeVar("T")


async def _soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, 10)


async def _next(stream: LeaseStream, kind: type[E]) -> E:
    """The next event of a kind; others (idle notices, connections) may come before it."""

    async def search() -> E:
        async for event in stream:
            if isinstance(event, kind):
                return event
        raise AssertionError(f"the stream ended without {kind.__name__}")

    return await _soon(search())


async def _work(stream: LeaseStream, count: int) -> list[LeasedRollout]:
    return [(await _next(stream, Delivered)).work for _ in range(count)]


async def _enqueue(client: StoreClient, count: int) -> list[str]:
    made = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(count)])
    return [rollout.rollout_id for rollout in made]


async def test_deliveries_use_credits(client: StoreClient) -> None:
    ids = await _enqueue(client, 5)
    async with LeaseStream(client, worker_id="w", credits=2) as stream:
        first = await _work(stream, 2)
        assert stream.credits == 0
        assert [work.rollout.input for work in first] == [0, 1]
        assert first[0].rollout.attempt.leased
        assert first[0].rollout.attempt_credential == first[0].lease.attempt_credential != ""
        assert set(stream.held) == {work.attempt_id for work in first}
        assert (await client.statistics())["live_leases"] == 2
        stream.grant(2)
        assert len(await _work(stream, 2)) == 2
        stream.drain("enough")
        stream.grant(0)
        late = await _enqueue(client, 1)
    queued = await client.query_rollouts(status_in=["queuing", "requeuing"])
    assert {rollout.rollout_id for rollout in queued} == {*ids, *late}, "all were handed back on close"


async def test_completions_travel_together_and_carry_their_rewards(client: StoreClient) -> None:
    await _enqueue(client, 20)
    async with LeaseStream(client, worker_id="w", credits=20) as stream:
        works = await _work(stream, 20)

        async def finish(number: int, work: LeasedRollout) -> RolloutStatus:
            keys = {"rollout_id": work.lease.rollout_id, "attempt_id": work.attempt_id}
            failure = None if number else Failure(message="no")
            completion = Completion(
                lease=work.lease,
                status="succeeded" if number else "failed",
                failure=failure,
                rewards=[Reward(**keys, value=number / 2)],
            )
            return (await stream.complete(completion)).status

        statuses = await _soon(asyncio.gather(*(finish(n, work) for n, work in enumerate(works))))
        assert [str(status) for status in statuses] == ["failed"] + ["succeeded"] * 19
        assert stream.held == {}
    rewards = await client.query_rewards([work.lease.rollout_id for work in works])
    assert sorted(reward.value for reward in rewards) == [n / 2 for n in range(20)]
    failed = await client.get_rollout_by_id(works[0].lease.rollout_id)
    assert failed is not None
    assert failed.failure is not None
    assert failed.failure.message == "no"


async def test_leases_outlive_their_duration_by_renewal(client: StoreClient) -> None:
    await _enqueue(client, 2)
    async with LeaseStream(client, worker_id="w", credits=2, lease_duration=1.0) as stream:
        works = await _work(stream, 2)
        (before, _) = await client.query_leases()

        async def renewed() -> bool:
            leases = await client.query_leases()
            assert len(leases) == 2
            return min(lease.expire_time for lease in leases) > before.grant_time + 2.0

        await eventually(renewed, what="leases that live twice their duration")
        assert set(stream.held) == {work.attempt_id for work in works}


async def test_a_lost_lease_is_told_and_its_completion_refused(client: StoreClient) -> None:
    await _enqueue(client, 1)
    async with LeaseStream(client, worker_id="w", credits=1, lease_duration=1.0) as stream:
        (work,) = await _work(stream, 1)
        assert await client.expire_leases([work.attempt_id]) == [work.attempt_id]
        lost = await _next(stream, LeaseEnded)
        assert (lost.rollout_id, lost.attempt_id) == (work.lease.rollout_id, work.attempt_id)
        assert stream.held == {}
        last = Span.from_attributes(attributes={}, name="last", rollout_id="", attempt_id="")
        with pytest.raises(LeaseLost) as caught:
            await stream.complete(Completion(lease=work.lease, spans=[last]))
        assert caught.value.reason == "LEASE_LOST"


async def test_cancelling_reaches_the_worker_until_it_is_acknowledged(client: StoreClient) -> None:
    await _enqueue(client, 1)
    async with LeaseStream(client, worker_id="w", credits=1) as stream:
        (work,) = await _work(stream, 1)
        await client.cancel_rollouts([work.lease.rollout_id], reason="not needed")
        event = await _next(stream, Commanded)
        assert event.command.kind is CommandKind.CANCEL
        assert event.command.attempt_id == work.attempt_id
        stream.acknowledge(event.command)

        async def acknowledged() -> bool:
            renewals = await client.renew_leases("w", [])
            return not renewals.commands

        await eventually(acknowledged, what="an acknowledged command")


async def test_held_leases_and_credits_survive_a_disconnect(store: StoreServer, client: StoreClient) -> None:
    await _enqueue(client, 2)
    async with FlakyProxy(store.address) as proxy:
        through = StoreClient(proxy.address)
        async with LeaseStream(through, worker_id="w", credits=3, lease_duration=30.0) as stream:
            works = await _work(stream, 2)
            for _ in range(3):
                proxy.cut()
                await _next(stream, Disconnected)
                await _next(stream, Connected)
            assert stream.credits == 1
            assert set(stream.held) == {work.attempt_id for work in works}
            await _enqueue(client, 2)
            (third,) = await _work(stream, 1)
            assert third.rollout.attempt.sequence_id == 1
            for work in [*works, third]:
                assert (await stream.complete(Completion(lease=work.lease))).status is RolloutStatus.SUCCEEDED
        await through.close()
    waiting = await client.query_rollouts(status_in=["queuing"])
    assert len(waiting) == 1, "one credit, one delivery"


async def test_releasing_hands_work_to_another(client: StoreClient) -> None:
    (rollout_id,) = await _enqueue(client, 1)
    async with (
        LeaseStream(client, worker_id="one", credits=1) as one,
        LeaseStream(client, worker_id="two") as two,
    ):
        (work,) = await _work(one, 1)
        two.grant(1)
        assert await one.release([work.lease], "too big for me") == [None]
        (again,) = await _work(two, 1)
        assert again.lease.rollout_id == rollout_id
        assert again.attempt_id != work.attempt_id
        (refusal,) = await client.release_attempts("one", [work.lease])
        assert isinstance(refusal, LeaseLost)


async def test_unary_leasing(client: StoreClient) -> None:
    assert await client.lease_rollouts("w", "s") == []
    waiting = asyncio.create_task(client.lease_rollouts("w", "s", limit=5, wait=10.0))
    await _enqueue(client, 2)
    works = await _soon(waiting)
    assert 1 <= len(works) <= 2
    results = await client.complete_attempts("w", [Completion(lease=work.lease) for work in works])
    assert all(getattr(result, "status", None) == "succeeded" for result in results)
    (again,) = await client.complete_attempts("w", [Completion(lease=works[0].lease, status="failed")])
    assert isinstance(again, LeaseLost)


async def test_a_store_that_refuses_the_stream_ends_it_with_the_reason(client: StoreClient) -> None:
    async with LeaseStream(client, worker_id="", credits=1) as stream:
        events: list[LeaseEvent] = []

        async def read() -> None:
            events.extend([event async for event in stream])

        with pytest.raises(ValueError, match="worker_id"):
            await _soon(read())
