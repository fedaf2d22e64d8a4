"""Leases, fencing, redelivery and timers through the wire (R6-R9)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from agl_grpc.store.clock import SECOND, ManualClock, SystemClock
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import attempt_pb2, reward_pb2, runner_service_pb2, span_pb2, store_service_pb2
from tests.store.rig import FAILED, SUCCEEDED, TIMEOUT, UNRESPONSIVE, Rig, held, reason, running, seconds
from tests.store.span_support import span


async def test_a_life_from_enqueue_to_success(rig: Rig) -> None:
    (made,) = await rig.enqueue(rollout_id="mine", group_id="g")
    assert made.rollout_id == "mine"
    (leased,) = await rig.lease()
    assert leased.rollout.rollout_id == "mine"
    assert leased.attempt.sequence_id == 1
    assert leased.lease.lease_token
    assert leased.lease.attempt_credential
    assert leased.lease.duration.seconds == 30
    assert await rig.status("mine") == "preparing"
    await rig.span(leased.attempt, 1)
    assert await rig.status("mine") == "running"
    (result,) = await rig.complete(leased, rewards=[reward_pb2.Reward(value=0.0)])
    assert not result.HasField("error")
    assert result.rollout.sealed
    after = await rig.rollout("mine")
    assert after.attempt.status == SUCCEEDED
    assert after.attempt.sealed
    assert await rig.status("mine") == "succeeded"
    rewards = await rig.store.ListRewards(store_service_pb2.ListRewardsRequest(rollout_ids=["mine"]))
    assert [(one.name, one.value, one.HasField("value")) for one in rewards.rewards] == [
        ("primary", 0.0, True)
    ]


async def test_only_the_holder_may_end_an_attempt(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    (leased,) = await rig.lease()
    forged = runner_service_pb2.LeasedRollout()
    forged.CopyFrom(leased)
    forged.lease.lease_token = b"x" * 16
    (refused,) = await rig.complete(forged)
    assert refused.error.code == 9
    assert (await rig.renew(forged)).renewals[0].HasField("error")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.update_attempt(leased.attempt, SUCCEEDED)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) == "LEASE_LOST"
    assert (await rig.update_attempt(leased.attempt, SUCCEEDED, leased.lease.lease_token)).status == SUCCEEDED
    (late,) = await rig.complete(leased)
    assert late.error.code == 9


async def test_an_expired_lease_is_redelivered_and_its_token_refused(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    (first,) = await rig.lease(lease_duration=seconds(10))
    await rig.advance(9.9)
    assert await rig.status("r") == "preparing"
    await rig.advance(0.2)
    assert await rig.status("r") == "requeuing"
    (lost,) = await rig.attempts("r")
    assert lost.status == UNRESPONSIVE
    assert lost.lease_lost
    assert lost.failure.kind == attempt_pb2.FAILURE_KIND_INFRASTRUCTURE
    (refused,) = await rig.complete(first)
    assert refused.error.code == 9, "refused although nobody else has it yet"
    (second,) = await rig.lease("w2")
    assert second.attempt.sequence_id == 2
    (refused,) = await rig.complete(first)
    assert refused.error.code == 9
    (done,) = await rig.complete(second)
    assert not done.HasField("error")
    assert await rig.status("r") == "succeeded"


async def test_renewals_keep_a_lease(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    (leased,) = await rig.lease(lease_duration=seconds(10))
    for _ in range(5):
        await rig.advance(8)
        answer = await rig.renew(leased)
        assert answer.renewals[0].duration.seconds == 10
    assert await rig.status("r") == "preparing"
    await rig.advance(10.1)
    assert await rig.status("r") == "requeuing"


async def test_redeliveries_are_counted_apart_from_attempts(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    for _ in range(4):
        assert len(await rig.lease()) == 1
        await rig.advance(31)
    assert await rig.status("r") == "failed"
    after = await rig.rollout("r")
    assert after.rollout.failure.kind == attempt_pb2.FAILURE_KIND_INFRASTRUCTURE
    assert after.rollout.attempt_count == 4
    assert after.rollout.sealed


async def test_a_release_uses_up_nothing(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r")
    for _ in range(6):
        (leased,) = await rig.lease()
        request = runner_service_pb2.ReleaseAttemptsRequest(worker_id="w1", leases=[held(leased)])
        answer = await rig.runner.ReleaseAttempts(request)
        assert not answer.results[0].HasField("error")
        assert await rig.status("r") == "requeuing"
    (leased,) = await rig.lease()
    await rig.complete(leased, status=FAILED)
    assert await rig.status("r") == "failed"
    assert len(await rig.attempts("r")) == 7


async def test_failures_are_retried_with_back_off(rig: Rig) -> None:
    config = {"max_attempts": 3, "retry_condition": [FAILED]}
    await rig.enqueue(rollout_id="r", config=config)
    (leased,) = await rig.lease()
    await rig.complete(leased, status=FAILED, failure=attempt_pb2.Failure(message="boom", type="ValueError"))
    assert await rig.status("r") == "requeuing"
    assert await rig.lease() == []
    await rig.advance(0.9)
    assert await rig.lease() == []
    await rig.advance(0.2)
    (leased,) = await rig.lease()
    await rig.complete(leased, status=FAILED)
    await rig.advance(1.9)
    assert await rig.lease() == []
    await rig.advance(0.2)
    (leased,) = await rig.lease()
    await rig.complete(leased, status=FAILED)
    assert await rig.status("r") == "failed"
    attempts = await rig.attempts("r")
    assert [one.sequence_id for one in attempts] == [1, 2, 3]
    assert attempts[0].failure.message == "boom"
    assert attempts[0].failure.kind == attempt_pb2.FAILURE_KIND_AGENT


async def test_a_timeout_counts_from_the_attempts_start_and_stops_the_worker(rig: Rig) -> None:
    await rig.enqueue(rollout_id="r", config={"timeout": seconds(20)})
    await rig.advance(100)
    assert await rig.status("r") == "queuing", "waiting is no attempt"
    (leased,) = await rig.lease()
    await rig.advance(15)
    answer = await rig.renew(leased)
    assert not answer.commands
    await rig.advance(5)
    (attempt,) = await rig.attempts("r")
    assert attempt.status == TIMEOUT
    assert await rig.status("r") == "failed"
    answer = await rig.renew(leased)
    assert answer.renewals[0].error.code == 9
    assert [command.attempt_id for command in answer.commands] == [attempt.attempt_id]


async def test_silence_without_a_lease(rig: Rig) -> None:
    config = {"unresponsive": seconds(5), "max_attempts": 2, "retry_condition": [UNRESPONSIVE]}
    await rig.enqueue(rollout_id="r", config=config)
    request = store_service_pb2.DequeueRolloutsRequest(worker_id="old")
    (taken,) = (await rig.store.DequeueRollouts(request)).rollouts
    attempt = taken.rollout.attempt
    assert not attempt.leased
    await rig.advance(4)
    await rig.span(attempt, 1)
    await rig.advance(4)
    assert await rig.status("r") == "running"
    await rig.advance(1.1)
    (silent,) = await rig.attempts("r")
    assert silent.status == UNRESPONSIVE
    assert not silent.sealed, "it may come back"
    assert await rig.status("r") == "requeuing"
    await rig.span(attempt, 2)
    assert await rig.status("r") == "running"
    await rig.advance(5.1)
    assert await rig.status("r") == "requeuing", "coming back gave its try back"
    await rig.advance(2)
    (again,) = (await rig.store.DequeueRollouts(request)).rollouts
    assert again.rollout.attempt.sequence_id == 2
    await rig.span(attempt, 3)
    first, second = await rig.attempts("r")
    assert first.status == UNRESPONSIVE, "a newer attempt exists"
    assert first.sealed
    assert second.status == attempt_pb2.ATTEMPT_STATUS_PREPARING
    await rig.update_attempt(second, SUCCEEDED)
    assert await rig.status("r") == "succeeded"


async def test_an_older_attempt_does_not_move_its_rollout(rig: Rig) -> None:
    started = await rig.store.StartRollout(store_service_pb2.StartRolloutRequest(rollout={"rollout_id": "r"}))
    first = started.rollout.attempt
    request = store_service_pb2.StartAttemptRequest(rollout_id="r")
    second = (await rig.store.StartAttempt(request)).rollout.attempt
    await rig.update_attempt(first, FAILED)
    assert await rig.status("r") == "preparing"
    await rig.update_attempt(second, SUCCEEDED)
    assert await rig.status("r") == "succeeded"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.StartAttempt(request)
    assert reason(caught.value) == "ILLEGAL_TRANSITION"


async def test_timers_fire_by_themselves_on_an_idle_store(database: Path | str | None) -> None:
    async with running(database, SystemClock()) as rig:
        await rig.enqueue(rollout_id="r", config={"max_redeliveries": 0})
        await rig.lease(lease_duration=seconds(1))
        answer = await rig.wait("r", timeout=seconds(20))
        assert answer.complete
        assert await rig.status("r") == "failed"


async def test_a_restart_gives_every_lease_its_full_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path / "store.db", clock) as rig:
        await rig.enqueue(rollout_id="r")
        (leased,) = await rig.lease()
    clock.advance(3600)
    async with running(tmp_path / "store.db", clock) as rig:
        await rig.advance(29)
        assert await rig.status("r") == "preparing"
        (done,) = await rig.complete(leased)
        assert not done.HasField("error")


async def test_operators_see_and_end_leases(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    await rig.enqueue(rollout_id="b")
    leased = await rig.lease(limit=2)
    leases = (await rig.store.ListLeases(store_service_pb2.ListLeasesRequest())).leases
    assert [one.rollout_id for one in leases] == ["a", "b"]
    assert leases[0].worker_id == "w1"
    assert leases[0].session_id == "s1"
    request = store_service_pb2.ExpireLeasesRequest(worker_id="w1")
    ended = (await rig.store.ExpireLeases(request)).attempt_ids
    assert set(ended) == {one.attempt.attempt_id for one in leased}
    assert not (await rig.store.ListLeases(store_service_pb2.ListLeasesRequest())).leases
    assert await rig.status("a") == "requeuing"


async def test_a_repeated_lease_request_answers_the_same_leases(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    await rig.enqueue(rollout_id="b")
    request = runner_service_pb2.LeaseRolloutsRequest(request_id="q", worker_id="w1", session_id="s1")
    first = await rig.runner.LeaseRollouts(request)
    assert await rig.runner.LeaseRollouts(request) == first
    assert await rig.status("b") == "queuing"


async def test_a_repeated_long_poll_answers_the_lease_of_the_first(rig: Rig) -> None:
    request = runner_service_pb2.LeaseRolloutsRequest(
        request_id="q", worker_id="w1", session_id="s1", wait=seconds(20)
    )
    polls = [asyncio.ensure_future(rig.runner.LeaseRollouts(request))]
    await _until_waiting(rig, 1)
    await rig.enqueue(rollout_id="a")
    first = await polls[0]
    assert first.rollouts[0].rollout.rollout_id == "a"
    assert await rig.runner.LeaseRollouts(request) == first


async def test_a_repeated_completion_is_one_completion(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    first = await rig.complete(leased, request_id="c", rewards=[reward_pb2.Reward(value=1.0)])
    assert await rig.complete(leased, request_id="c", rewards=[reward_pb2.Reward(value=1.0)]) == first
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.complete(leased, request_id="c", status=FAILED)
    assert reason(caught.value) == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("own", [["", "default"], ["default", ""], ["", "other", "default", ""]])
async def test_a_queue_that_is_named_twice_is_one_queue(rig: Rig, own: list[str]) -> None:
    """A run's own queue has two names: the run's, and none."""
    for number in range(4):
        await rig.enqueue(rollout_id=f"r{number}")
    leased = await rig.lease(limit=2, queues=own)
    request = store_service_pb2.DequeueRolloutsRequest(queues=own, limit=10)
    taken = (await rig.store.DequeueRollouts(request)).rollouts
    found = [one.rollout.rollout_id for one in leased] + [one.rollout.rollout.rollout_id for one in taken]
    assert found == ["r0", "r1", "r2", "r3"]
    waiting = asyncio.create_task(rig.lease(wait=30, queues=own))
    await rig.enqueue(rollout_id="later")
    (later,) = await waiting
    assert later.rollout.rollout_id == "later"


async def test_a_bad_completion_does_not_block_its_neighbours(rig: Rig) -> None:
    for name in ("a", "b", "c"):
        await rig.enqueue(rollout_id=name)
    leased = await rig.lease(limit=3)
    request = runner_service_pb2.CompleteAttemptsRequest(worker_id="w1")
    for one in leased:
        request.completions.add(
            attempt_id=one.attempt.attempt_id, lease_token=one.lease.lease_token, status=SUCCEEDED
        )
    request.completions[1].rewards.add(value=1.0)
    request.completions[1].rewards.add(value=float("nan"))
    results = (await rig.runner.CompleteAttempts(request)).results
    assert [one.error.code for one in results] == [0, 3, 0]
    assert await rig.status("b") == "preparing"
    rewards = await rig.store.ListRewards(store_service_pb2.ListRewardsRequest(rollout_ids=["b"]))
    assert not rewards.rewards, "the good reward before the bad one is undone"


async def test_a_completion_brings_its_last_spans(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    spans = [_early(), _early(name=""), _early()]
    first = await rig.complete(leased, request_id="c", spans=spans)
    assert await rig.complete(leased, request_id="c", spans=spans) == first
    (done,) = first
    assert not done.HasField("error")
    assert [(one.group_index, one.index, one.status.metadata[0].value) for one in done.rejected] == [
        (0, 1, "completions[0].spans[1].name")
    ]
    assert await rig.status("a") == "succeeded"
    (attempt,) = await rig.attempts("a")
    stored = await _spans_of(rig, "a")
    assert [(one.sequence_id, one.span, one.late) for one in stored] == [
        (1, spans[0], False),
        (2, spans[2], False),
    ]
    assert attempt.sealed
    assert {one.received_time.ToMicroseconds() for one in stored} == {attempt.end_time.ToMicroseconds()}


async def test_last_spans_do_not_hang_on_their_completion(rig: Rig) -> None:
    for name in ("a", "b"):
        await rig.enqueue(rollout_id=name)
    first, second = await rig.lease(limit=2)
    request = runner_service_pb2.CompleteAttemptsRequest(worker_id="w1")
    for leased, token in ((first, b"wrong"), (second, second.lease.lease_token)):
        completion = request.completions.add(lease_token=token, status=SUCCEEDED, spans=[_early()])
        completion.attempt_id = leased.attempt.attempt_id
    results = (await rig.runner.CompleteAttempts(request)).results
    assert [(one.error.code, len(one.rejected)) for one in results] == [(9, 0), (0, 0)]
    assert await rig.status("a") == "running"
    assert [len(await _spans_of(rig, name)) for name in ("a", "b")] == [1, 1]
    (late,) = await rig.complete(second, spans=[_early()])
    assert late.error.code == 9
    assert [one.late for one in await _spans_of(rig, "b")] == [False, True]


def _early(name: str = "step") -> span_pb2.Span:
    """A span of long ago: the tests' clocks are not today's."""
    return span(name, start_time_unix_nano=1, end_time_unix_nano=2)


async def _spans_of(rig: Rig, rollout_id: str) -> list[span_pb2.StoredSpan]:
    request = store_service_pb2.ListSpansRequest(rollout_id=rollout_id)
    return list((await rig.store.ListSpans(request)).spans)


async def test_an_output_is_kept_as_metadata(rig: Rig) -> None:
    await rig.enqueue(rollout_id="a")
    (leased,) = await rig.lease()
    await rig.complete(leased, output={"data": b'{"answer": 42}'})
    (attempt,) = await rig.attempts("a")
    assert [(one.key, one.value.string_value) for one in attempt.metadata] == [("output", '{"answer": 42}')]


async def _until_waiting(rig: Rig, count: int) -> None:
    from tests.support.waiting import eventually

    async def waiting() -> bool:
        workers = await rig.store.ListWorkers(store_service_pb2.ListWorkersRequest())
        return len(workers.workers) >= count

    await eventually(waiting, what=f"{count} workers waiting")


async def test_a_machine_clock_that_was_set_back_moves_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path / "store.db", SystemClock()) as rig:
        await rig.enqueue(rollout_id="a")
        (leased,) = await rig.lease(lease_duration=seconds(1))
        before = rig.clock.now()
    monkeypatch.setattr("agl_grpc.store.clock.time.time_ns", lambda: (before - 3600 * SECOND) * 1000)
    server = await StoreServer.start(ServeConfig(port=0, database=tmp_path / "store.db", grace=1.0))
    rig = Rig(server, server.store.clock)
    try:
        assert rig.clock.now() > before - SECOND
        # The lease has its second anew, then its rollout is delivered again.
        again = await rig.lease(wait=10)
        assert [one.attempt.sequence_id for one in again] == [2]
        (renewal,) = (await rig.renew(leased)).renewals
        assert renewal.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    finally:
        await rig.close()
