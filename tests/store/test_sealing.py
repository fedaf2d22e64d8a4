"""Nothing is sealed before those who were cut off from the store had time to come back to it (R11)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.client.channel import RetryPolicy
from agl_grpc.interceptor.capture import transport
from agl_grpc.store.clock import SECOND, ManualClock
from agl_grpc.store.rollouts.lifecycle import RECONNECT_GRACE
from agl_grpc.v1 import run_pb2, span_pb2, store_service_pb2
from tests.store.rig import Rig, running, seconds
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually

SEALED = store_service_pb2.WAIT_UNTIL_SEALED
GRACE = RECONNECT_GRACE / SECOND


@pytest.fixture(params=["file", "postgres"])
def lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """Where a store keeps what outlives its server."""
    if request.param == "file":
        yield tmp_path / "store.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    with server.lend() as url:
        yield url


@asynccontextmanager
async def restarted(
    lasting: Path | str, clock: ManualClock, *names: str, **run: Any
) -> AsyncIterator[tuple[Rig, list[Any]]]:
    """A server that takes the store up again after an hour; attempts at these rollouts live on meanwhile."""
    async with running(lasting, clock) as rig:
        if run:
            request = store_service_pb2.UpdateRunRequest(run=run_pb2.Run(run_id="default", **run))
            request.update_mask.paths.extend(run)
            await rig.store.UpdateRun(request)
        for name in names:
            await rig.enqueue(rollout_id=name)
        leased = await rig.lease(limit=len(names)) if names else []
    clock.advance(3600)
    async with running(lasting, clock) as rig:
        yield rig, leased


async def is_sealed(rig: Rig, rollout_id: str) -> bool:
    """Whether a rollout is sealed, as its wait sees it too."""
    wait = await rig.wait(rollout_id, until=SEALED, timeout=seconds(0))
    found = await rig.rollout(rollout_id)
    assert found.rollout.sealed == found.attempt.sealed == wait.complete
    return bool(wait.complete)


async def late_spans(rig: Rig, rollout_id: str) -> list[bool]:
    """For each span of a rollout whether it came too late to be trained."""
    answer = await rig.store.ListSpans(store_service_pb2.ListSpansRequest(rollout_id=rollout_id))
    return [one.late for one in answer.spans]


async def complete(rig: Rig, *leased: Any) -> None:
    for done in await rig.complete(*leased):
        assert not done.HasField("error"), done


async def test_a_call_that_comes_after_the_completion_is_trained_when_the_store_was_away(
    lasting: Path | str,
) -> None:
    clock = ManualClock()
    async with restarted(lasting, clock, "r") as (rig, (leased,)):
        clock.advance(0.5)
        begun = (clock.now() - 2 * SECOND) * 1000
        await complete(rig, leased)
        assert await rig.status("r") == "succeeded"
        assert (await rig.wait("r", timeout=seconds(0))).complete, "its end is not put off, only its seal is"
        assert not await is_sealed(rig, "r")
        await rig.advance(2)
        await rig.span(leased.attempt, 1, start_time_unix_nano=begun)
        assert not await is_sealed(rig, "r")
        await rig.advance(GRACE - 2.6)
        assert not await is_sealed(rig, "r")
        await rig.advance(0.1)
        assert await is_sealed(rig, "r")
        assert not (await rig.rollout("r")).attempt.capture_incomplete
        await rig.span(leased.attempt, 2, start_time_unix_nano=begun)
        assert await late_spans(rig, "r") == [False, True]


async def test_a_call_that_is_announced_in_the_grace_is_waited_for_after_it(lasting: Path | str) -> None:
    clock = ManualClock()
    async with restarted(lasting, clock, "r") as (rig, (leased,)):
        begun = clock.now() * 1000
        clock.advance(1)
        await complete(rig, leased)
        request = store_service_pb2.AppendSpansRequest()
        group = request.groups.add(attempt_id=leased.attempt.attempt_id)
        group.open_calls.append(span_pb2.OpenCall(span_id=b"12345678", start_time_unix_nano=begun))
        assert not (await rig.store.AppendSpans(request)).rejected
        await rig.advance(GRACE + 40)
        assert not await is_sealed(rig, "r")
        del group.open_calls[:]
        group.abandoned_calls.append(b"12345678")
        assert not (await rig.store.AppendSpans(request)).rejected
        assert await is_sealed(rig, "r")


async def test_also_what_begins_in_the_grace_is_sealed_after_it(lasting: Path | str) -> None:
    """Its agent's calls go through interceptors that are not back yet either."""
    clock = ManualClock()
    async with restarted(lasting, clock, "before") as (rig, (before,)):
        await rig.advance(3)
        await rig.enqueue(rollout_id="after")
        (after,) = await rig.lease()
        await complete(rig, before, after)
        assert [await is_sealed(rig, name) for name in ("before", "after")] == [False, False]
        await rig.advance(GRACE - 3)
        assert [await is_sealed(rig, name) for name in ("before", "after")] == [True, True]
        await rig.enqueue(rollout_id="later")
        await complete(rig, *await rig.lease())
        assert await is_sealed(rig, "later")


async def test_a_store_without_attempts_seals_at_once(lasting: Path | str) -> None:
    """There is nothing that anybody could hold calls of."""
    clock = ManualClock()
    async with restarted(lasting, clock) as (rig, _):
        await rig.enqueue(rollout_id="r")
        await complete(rig, *await rig.lease())
        assert await is_sealed(rig, "r")


async def test_a_run_that_waits_less_for_open_calls_waits_less_for_what_was_cut_off(
    lasting: Path | str,
) -> None:
    clock = ManualClock()
    async with restarted(lasting, clock, "r", seal_timeout=seconds(1)) as (rig, (leased,)):
        await complete(rig, leased)
        assert not await is_sealed(rig, "r")
        await rig.advance(1)
        assert await is_sealed(rig, "r")


async def test_a_cancelled_and_a_lost_attempt_wait_for_what_was_cut_off_too(lasting: Path | str) -> None:
    clock = ManualClock()
    async with restarted(lasting, clock, "cancelled", "lost") as (rig, leased):
        assert await rig.cancel("cancelled") == ["cancelled"]
        await rig.server.store.timers.fire()
        assert not await is_sealed(rig, "cancelled")
        request = store_service_pb2.ExpireLeasesRequest(attempt_ids=[leased[1].attempt.attempt_id])
        assert (await rig.store.ExpireLeases(request)).attempt_ids == request.attempt_ids
        (lost,) = await rig.attempts("lost")
        assert not lost.sealed
        await rig.advance(GRACE)
        assert await is_sealed(rig, "cancelled")
        (lost,) = await rig.attempts("lost")
        assert (lost.sealed, lost.lease_lost) == (True, True)


async def test_a_server_that_goes_from_beside_others_is_an_absence(postgres: PostgresServer) -> None:
    """Whoever used it needs time to come to another one, which was there all the while."""
    clock = ManualClock()
    with postgres.lend() as url:
        async with AsyncExitStack() as stack:
            stays = await stack.enter_async_context(running(url, clock))
            async with running(url, clock):
                await stays.enqueue(rollout_id="before")
                await complete(stays, *await stays.lease())
                assert await is_sealed(stays, "before"), "a server that joins is none"
                await stays.enqueue(rollout_id="r")
                (leased,) = await stays.lease()

            async def noticed() -> bool:
                sql = "SELECT returned FROM counters"
                ((returned,),) = await stays.server.store.read(lambda db: db.execute(sql).fetchall())
                return bool(returned == clock.now())

            await eventually(noticed, what="the other one's end is noticed")
            await complete(stays, leased)
            assert not await is_sealed(stays, "r")
            await stays.advance(GRACE)
            assert await is_sealed(stays, "r")


def test_every_producer_is_back_within_the_grace() -> None:
    """Two tries, as the first may meet a channel that waits: 2 s at most, a fifth more at random."""
    channel_waits = 2.0 * 1.2
    for longest in (transport.LONGEST_BACKOFF, RetryPolicy().longest_wait):
        assert 2 * longest + channel_waits <= GRACE - 2
