"""Runs that name graders: who waits, who may judge, what a failure to judge is."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from agl_grpc.client.channel import open_channel
from agl_grpc.v1 import attempt_pb2, reward_pb2, rollout_pb2, run_pb2, store_service_pb2
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from tests.store.rig import FAILED, Rig, reason, seconds

SEALED = store_service_pb2.WAIT_UNTIL_SEALED
GRADER = attempt_pb2.FAILURE_KIND_GRADER


async def graded_run(rig: Rig, *names: str, patience: float = 600.0) -> None:
    run = run_pb2.Run(
        run_id="g",
        graders=[run_pb2.RunGrader(name=name, version="1") for name in names],
        grading_timeout=seconds(patience),
    )
    await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run))


async def ended(rig: Rig, rollout_id: str, **fields: Any) -> Any:
    await rig.enqueue(run_id="g", rollout_id=rollout_id)
    (leased,) = await rig.lease(run_id="g")
    await rig.complete(leased, **fields)
    return leased.attempt


def verdict(
    attempt: Any, name: str, value: float | None, version: str = "1", **fields: Any
) -> reward_pb2.Reward:
    failure = None if value is not None else attempt_pb2.Failure(kind=GRADER, message="it broke")
    return reward_pb2.Reward(
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        name=name,
        grader=name,
        grader_version=version,
        value=value,
        failure=failure,
        **fields,
    )


async def put(rig: Rig, *rewards: reward_pb2.Reward) -> list[Any]:
    return list((await rig.store.PutRewards(store_service_pb2.PutRewardsRequest(rewards=rewards))).rewards)


async def sealed(rig: Rig, rollout_id: str) -> bool:
    return bool((await rig.wait(rollout_id, until=SEALED, timeout=seconds(0))).complete)


async def test_a_rollout_is_sealed_when_every_grader_has_answered(rig: Rig) -> None:
    await graded_run(rig, "maths", "style")
    attempt = await ended(rig, "ro-1")
    one = await rig.rollout("ro-1")
    assert (one.attempt.sealed, one.rollout.sealed) == (True, False)
    await put(rig, verdict(attempt, "maths", 0.0))
    await put(rig, verdict(attempt, "style", 1.0, version="0"))  # not the version that is waited for
    assert not await sealed(rig, "ro-1")
    await put(rig, verdict(attempt, "style", None))
    assert await sealed(rig, "ro-1")
    listed = await rig.store.ListRewards(store_service_pb2.ListRewardsRequest(rollout_ids=["ro-1"]))
    maths, style = listed.rewards
    assert (maths.value, maths.HasField("failure")) == (0.0, False)
    assert (style.HasField("value"), style.failure.kind, style.failure.message) == (False, GRADER, "it broke")
    assert (style.revision, style.grader_version) == (2, "1")


async def test_a_rollout_that_failed_waits_for_nobody_and_one_with_verdicts_at_its_end_neither(
    rig: Rig,
) -> None:
    await graded_run(rig, "maths")
    await ended(rig, "ro-1", status=FAILED)
    assert await sealed(rig, "ro-1")
    early = [reward_pb2.Reward(name="maths", grader="maths", grader_version="1", value=1.0)]
    await ended(rig, "ro-2", rewards=early)
    assert await sealed(rig, "ro-2")


async def test_when_the_time_is_over_the_missing_verdicts_are_failures(rig: Rig) -> None:
    await graded_run(rig, "maths", "style", patience=30)
    attempt = await ended(rig, "ro-1")
    await put(rig, verdict(attempt, "maths", 1.0))
    await rig.advance(29)
    assert not await sealed(rig, "ro-1")
    await rig.advance(2)
    assert await sealed(rig, "ro-1")
    listed = await rig.store.ListRewards(store_service_pb2.ListRewardsRequest(rollout_ids=["ro-1"]))
    assert [(r.name, r.HasField("value"), r.failure.type) for r in listed.rewards] == [
        ("maths", True, ""),
        ("style", False, "no_verdict"),
    ]
    # Who comes too late still judges, as a new revision.
    (late,) = await put(rig, verdict(attempt, "style", 0.5))
    assert late.revision == 2


async def test_a_run_that_drops_a_grader_waits_for_it_no_longer(rig: Rig) -> None:
    await graded_run(rig, "maths")
    await ended(rig, "ro-1")
    request = store_service_pb2.UpdateRunRequest(run=run_pb2.Run(run_id="g"))
    request.update_mask.paths.append("graders")
    await rig.store.UpdateRun(request)
    assert await sealed(rig, "ro-1")


async def test_a_revision_is_written_once(rig: Rig) -> None:
    await graded_run(rig, "maths")
    attempt = await ended(rig, "ro-1")
    first = verdict(attempt, "maths", 1.0, revision=1)
    await put(rig, first)
    await put(rig, first)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(rig, verdict(attempt, "maths", None, revision=1))
    assert reason(caught.value) == "ENTITY_EXISTS"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"value": 1.0, "failure": {"kind": GRADER}}, "failure"),
        ({"failure": {"kind": attempt_pb2.FAILURE_KIND_AGENT}}, "failure"),
        ({}, "value"),
    ],
)
async def test_a_reward_is_a_value_or_a_grader_s_failure(rig: Rig, fields: Any, path: str) -> None:
    await graded_run(rig, "maths")
    attempt = await ended(rig, "ro-1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(rig, reward_pb2.Reward(rollout_id="ro-1", attempt_id=attempt.attempt_id, **fields))
    assert reason(caught.value) == "INVALID_FIELD"
    assert f"rewards[0].{path}" in str(caught.value.details())


async def test_a_grader_s_credential_judges_its_run_and_does_nothing_else(rig: Rig) -> None:
    await graded_run(rig, "maths")
    attempt = await ended(rig, "ro-1")
    (other,) = await rig.enqueue(rollout_id="ro-other")
    (leased,) = await rig.lease()
    request = store_service_pb2.IssueCredentialRequest(run_id="g", role=store_service_pb2.ROLE_GRADER)
    made = await rig.store.IssueCredential(request)
    metadata = (("authorization", f"Bearer {made.credential}"),)
    async with open_channel(rig.server.address) as channel:
        stub: Any = StoreServiceStub(channel)

        async def refused(call: Any) -> str:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            return reason(caught.value)

        one = verdict(attempt, "maths", 1.0)
        await stub.PutRewards(store_service_pb2.PutRewardsRequest(rewards=[one]), metadata=metadata)
        assert await sealed(rig, "ro-1")
        await stub.GetRollout(store_service_pb2.GetRolloutRequest(rollout_id="ro-1"), metadata=metadata)
        theirs = verdict(leased.attempt, "maths", 1.0)
        call = stub.PutRewards(store_service_pb2.PutRewardsRequest(rewards=[theirs]), metadata=metadata)
        assert await refused(call) == "NOT_PERMITTED"
        # Of another run it cannot read either: neither by name nor by asking for all.
        pb = store_service_pb2
        reads: list[tuple[str, Any]] = [
            ("GetRun", pb.GetRunRequest(run_id="default")),
            ("GetRollout", pb.GetRolloutRequest(rollout_id="ro-other")),
            ("ListRollouts", pb.ListRolloutsRequest(filter=rollout_pb2.RolloutFilter(run_id="*"))),
            ("ListSpans", pb.ListSpansRequest(rollout_id="ro-other")),
            ("ListRewards", pb.ListRewardsRequest(rollout_ids=["ro-1", "ro-other"])),
            ("GetLatestResources", pb.GetLatestResourcesRequest()),
        ]
        for method, wrong in reads:
            assert await refused(getattr(stub, method)(wrong, metadata=metadata)) == "NOT_PERMITTED", method
        streams: list[tuple[str, Any]] = [
            ("ExportSpans", pb.ExportSpansRequest(run_id="*")),
            ("WatchRollouts", pb.WatchRolloutsRequest()),
        ]
        for method, wrong in streams:
            stream = getattr(stub, method)(wrong, metadata=metadata)
            assert await refused(stream.read()) == "NOT_PERMITTED", method
        await stub.ListRewards(pb.ListRewardsRequest(rollout_ids=["ro-1"]), metadata=metadata)
        for method, wrong in (
            ("EnqueueRollouts", store_service_pb2.EnqueueRolloutsRequest()),
            ("UpdateRun", store_service_pb2.UpdateRunRequest()),
            ("IssueCredential", request),
            ("AppendSpans", store_service_pb2.AppendSpansRequest()),
            ("DeleteRollouts", store_service_pb2.DeleteRolloutsRequest()),
        ):
            assert await refused(getattr(stub, method)(wrong, metadata=metadata)) == "NOT_PERMITTED"
        broken = (("authorization", f"Bearer {made.credential[:-4]}AAAA"),)
        call = stub.GetRollout(store_service_pb2.GetRolloutRequest(rollout_id="ro-1"), metadata=broken)
        assert await refused(call) == "UNAUTHENTICATED"
    assert other.rollout_id == "ro-other"


async def test_an_agent_cannot_answer_for_a_grader(rig: Rig) -> None:
    run = run_pb2.Run(run_id="g", allow_self_grading=True, graders=[run_pb2.RunGrader(name="maths")])
    await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run))
    await rig.enqueue(run_id="g", rollout_id="ro-1")
    (leased,) = await rig.lease(run_id="g")
    metadata = (("authorization", f"Bearer {leased.lease.attempt_credential}"),)
    request = store_service_pb2.PutRewardsRequest(rewards=[verdict(leased.attempt, "maths", 1.0)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.PutRewards(request, metadata=metadata)
    assert reason(caught.value) == "NOT_PERMITTED"


@pytest.mark.parametrize("names", [["a", "a"], [""], ["/x"], [f"n{i}" for i in range(33)]])
async def test_graders_that_cannot_be_named_so_are_refused(rig: Rig, names: list[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await graded_run(rig, *names)
    assert reason(caught.value) == "INVALID_FIELD"
