"""Limits of fields at the door: INVALID_ARGUMENT with the field's path. Pages: tokens are sealed."""

from __future__ import annotations

import base64
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.store.errors import STATUS_TRAILER
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store
from tests.store.rig import Rig, reason, running

DURATION, TIME = {"seconds": -1}, {"seconds": 2**40}
LARGE = b"x" * ((1 << 20) + 1)
NOTES = [{"key": "k", "value": {"bytes_value": LARGE}}]

BAD: list[tuple[str, Any, str]] = [
    ("EnqueueRollouts", store.EnqueueRolloutsRequest(rollouts=[{}, {"mode": 9}]), "rollouts[1].mode"),
    ("EnqueueRollouts", store.EnqueueRolloutsRequest(rollouts=[{"priority": -1001}]), "rollouts[0].priority"),
    (
        "EnqueueRollouts",
        store.EnqueueRolloutsRequest(rollouts=[{"config": {"timeout": DURATION}}]),
        "rollouts[0].config.timeout",
    ),
    ("EnqueueRollouts", store.EnqueueRolloutsRequest(rollouts=[{"metadata": NOTES}]), "rollouts[0].metadata"),
    (
        "EnqueueRollouts",
        store.EnqueueRolloutsRequest(rollouts=[{"input": {"data": LARGE}}]),
        "rollouts[0].input",
    ),
    ("EnqueueRollouts", store.EnqueueRolloutsRequest(rollouts=[{"queue": "a\0b"}]), "rollouts[0].queue"),
    ("StartRollout", store.StartRolloutRequest(rollout={"not_before": TIME}), "rollout.not_before"),
    ("ListRollouts", store.ListRolloutsRequest(page_size=-1), "page_size"),
    ("ListRollouts", store.ListRolloutsRequest(skip=-1), "skip"),
    ("ListRollouts", store.ListRolloutsRequest(order=7), "order"),
    ("ListRollouts", store.ListRolloutsRequest(filter={"status_in": [1, 77]}), "filter.status_in[1]"),
    ("DequeueRollouts", store.DequeueRolloutsRequest(limit=-1), "limit"),
    ("WaitRollouts", store.WaitRolloutsRequest(timeout=DURATION), "timeout"),
    ("WaitRollouts", store.WaitRolloutsRequest(rollout_ids=["x" * 129]), "rollout_ids[0]"),
    ("GetRun", store.GetRunRequest(run_id="r" * 200), "run_id"),
    ("CancelRollouts", store.CancelRolloutsRequest(reason="r" * 5000), "reason"),
    ("GetResources", store.GetResourcesRequest(resources_id="r", version=-2), "version"),
    ("LeaseRollouts", runner.LeaseRolloutsRequest(worker_id="w", wait=DURATION), "wait"),
    (
        "RenewLeases",
        runner.RenewLeasesRequest(worker_id="w", leases=[{"lease_token": b"x" * 65}]),
        "leases[0].lease_token",
    ),
    (
        "CompleteAttempts",
        runner.CompleteAttemptsRequest(completions=[{"status": 44}]),
        "completions[0].status",
    ),
    (
        "CompleteAttempts",
        runner.CompleteAttemptsRequest(completions=[{"output": {"data": LARGE}}]),
        "completions[0].output",
    ),
    ("Heartbeat", runner.HeartbeatRequest(worker_id="w" * 257), "worker_id"),
    ("Heartbeat", runner.HeartbeatRequest(worker_id="w", stats=NOTES), "stats"),
]


def path_of(error: grpc.aio.AioRpcError) -> str:
    """The field that the error's BadRequest names."""
    trailers = dict(error.trailing_metadata() or ())
    bad = error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(trailers[STATUS_TRAILER]).details:
        if detail.Unpack(bad):
            return str(bad.field_violations[0].field)
    raise AssertionError(error)


async def test_a_field_that_breaks_its_limit_is_named() -> None:
    async with running(None) as rig:
        for method, request, path in BAD:
            stub = rig.store if hasattr(rig.store, method) else rig.runner
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(request)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (method, path)
            assert reason(caught.value) == "INVALID_FIELD"
            assert path_of(caught.value).startswith(path), (path_of(caught.value), path)
            assert str(caught.value.details()).startswith(path)


async def refused(rig: Rig, method: str, request: Any) -> bool:
    """Whether a page token is refused."""
    try:
        await getattr(rig.store, method)(request)
    except grpc.aio.AioRpcError as error:
        return reason(error) == "PAGE_TOKEN_INVALID"
    return False


async def test_a_page_token_that_was_changed_or_is_anothers_is_refused() -> None:
    async with running(None) as rig, running(None) as other:
        for one in (rig, other):
            await one.enqueue(rollout_id="a")
            await one.enqueue(rollout_id="b")
        request = store.ListRolloutsRequest(page_size=1, order_by="rollout_id")
        token = (await rig.store.ListRollouts(request)).next_page_token
        raw = base64.urlsafe_b64decode(token)
        forged = [
            raw[:20] + bytes([raw[20] ^ 1]) + raw[21:],
            raw[:16] + b"[[],1]",
            raw[:16] + b'["a",1e999]',
            b"",
        ]
        for bad in [*forged, raw[:-1]]:
            request.page_token = base64.urlsafe_b64encode(bad).decode() or "?"
            assert await refused(rig, "ListRollouts", request), bad
        request.page_token = token
        assert await refused(other, "ListRollouts", request)
        page = await rig.store.ListRollouts(request)
        assert [one.rollout.rollout_id for one in page.rollouts] == ["b"]


async def test_workers_are_paged_while_time_goes_on() -> None:
    async with running(None) as rig:
        for name in "abc":
            await rig.lease(worker=name)
        request = store.ListWorkersRequest(page_size=1, order_by="status", status_in=["WORKER_STATUS_IDLE"])
        found = []
        while True:
            page = await rig.store.ListWorkers(request)
            found += [worker.worker_id for worker in page.workers]
            await rig.advance(1)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert found == ["a", "b", "c"]


async def test_a_heartbeat_from_the_future_and_a_nameless_announcement_are_refused() -> None:
    async with running(None) as rig:
        await rig.enqueue(rollout_id="a")
        (leased,) = await rig.lease()
        name = leased.attempt.attempt_id
        request = store.UpdateAttemptRequest(attempt={"rollout_id": "a", "attempt_id": name})
        request.attempt.last_heartbeat_time.FromMicroseconds(rig.clock.now() + 25 * 3600 * 10**6)
        request.update_mask.paths.append("last_heartbeat_time")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.store.UpdateAttempt(request)
        assert path_of(caught.value) == "attempt.last_heartbeat_time"
        append = store.AppendSpansRequest()
        group = append.groups.add(attempt_id=name, abandoned_calls=[bytes(8)])
        group.open_calls.add(span_id=b"short")
        group.open_calls.add(span_id=b"12345678")
        group.spans.add(span_id=b"87654321", name="kept")
        answer = await rig.store.AppendSpans(append)
        assert [(one.index, one.span_id) for one in answer.rejected] == [(-2, b"short"), (-2, bytes(8))]
        assert answer.rejected[0].status.metadata[0].value == "groups[0].open_calls[0].span_id"
        assert answer.stored == 1
        assert (await rig.rollout("a")).attempt.open_calls == 1
