"""Limits of fields at the door: INVALID_ARGUMENT with the field's path. Pages: tokens are sealed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.store.errors import STATUS_TRAILER
from agl_grpc.store.storage.engine import Connection
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store
from agl_grpc.v1 import trainer_service_pb2 as trainer
from tests.store.rig import FAILED, Rig, reason, running

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


SERVICES = [
    service for module in (store, runner, trainer) for service in module.DESCRIPTOR.services_by_name.values()
]
SIGNED = {"priority"}
"""Numbers that may be negative."""
OWN_RULES = {"agl_grpc.v1.AttemptSpans", "agl_grpc.v1.Span", "agl_grpc.v1.AnyValue"}
"""Messages that are checked with the span or value; `test_spans.py` has their rules."""


def bad_values(field: FieldDescriptor) -> list[Any]:
    """What no field of this type may hold, whatever it means."""
    kind = field.message_type
    if field.enum_type is not None:
        return [999]
    if kind is not None:
        times = ("google.protobuf.Timestamp", "google.protobuf.Duration")
        return [{"seconds": -1}, {"seconds": 2**40}] if kind.full_name in times else []
    if field.type == FieldDescriptor.TYPE_STRING:
        return ["a\0b"]
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return [] if field.name in SIGNED else [-1]
    return []


def bad_messages(descriptor: Descriptor, seen: frozenset[str]) -> Iterator[tuple[str, Message]]:
    """Messages with one bad field each, also in the messages that they hold, and the field's path."""
    made = message_factory.GetMessageClass(descriptor)
    for field in descriptor.fields:
        path = f"{field.name}[0]" if field.is_repeated else field.name
        values = [(path, value) for value in bad_values(field)]
        kind = field.message_type
        if kind is not None and kind.full_name.startswith("agl_grpc.") and kind.full_name not in seen:
            inner = bad_messages(kind, seen | {kind.full_name})
            values += [(f"{path}.{rest}", message) for rest, message in inner]
        for bad, value in values:
            yield bad, made(**{field.name: [value] if field.is_repeated else value})


def unary_methods() -> list[MethodDescriptor]:
    """Every method of the contract that takes one request."""
    methods = [method for service in SERVICES for method in service.methods]
    return [method for method in methods if not method.client_streaming]


async def test_every_field_of_every_method_keeps_what_its_type_implies() -> None:
    """Unknown enum values, negative numbers, times out of range, NUL: nothing is written.

    `tests/contract/test_limits.py` has the limits that the contract states by field.
    """
    outcomes: dict[tuple[str, str], Any] = {}
    async with running(None) as rig:
        before = await rig.server.store.read(written)
        for method in unary_methods():
            name = f"/{method.containing_service.full_name}/{method.name}"
            many = rig.channel.unary_stream if method.server_streaming else rig.channel.unary_unary
            for path, request in bad_messages(method.input_type, frozenset(OWN_RULES)):
                call = many(name)(request.SerializeToString())
                try:
                    outcomes[name, path] = await (call.read() if method.server_streaming else call)
                except grpc.aio.AioRpcError as error:
                    outcomes[name, path] = error.code(), reason(error), path_of(error)
        assert await rig.server.store.read(written) == before
    refused = grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"
    wrong = {named: told for named, told in outcomes.items() if told != (*refused, named[1])}
    assert wrong == {}
    assert len(outcomes) > 300


def written(db: Connection) -> tuple[Any, ...]:
    """What any write would change."""
    counters = db.execute("SELECT * FROM counters").fetchone()
    assert counters is not None
    return counters


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


async def test_long_texts_of_a_failure_are_cut_wherever_it_is_said() -> None:
    long = {
        "kind": "FAILURE_KIND_AGENT",
        "message": "m" * 5000,
        "type": "t" * 300,
        "detail": "x" + "d" * 65536,
    }
    async with running(None) as rig:
        await rig.enqueue(rollout_id="a")
        (leased,) = await rig.lease()
        update = store.UpdateAttemptRequest(
            attempt={"attempt_id": leased.attempt.attempt_id, "failure": long}
        )
        update.update_mask.paths.append("failure")
        said = [(await rig.store.UpdateAttempt(update)).attempt.failure]
        wanted = {"training_run_id": "t", "algorithm": "verl"}
        await rig.trainer.CreateTrainingRun(trainer.CreateTrainingRunRequest(training_run=wanted))
        await rig.trainer.AcquireTrainingRun(
            trainer.AcquireTrainingRunRequest(training_run_id="t", trainer_id="me")
        )
        end = trainer.FinishTrainingRunRequest(
            training_run_id="t", trainer_epoch=1, status="TRAINING_RUN_STATUS_FAILED", failure=long
        )
        said.append((await rig.trainer.FinishTrainingRun(end)).training_run.failure)
        await rig.complete(leased, status=FAILED, failure=long)
        said.append((await rig.rollout("a")).attempt.failure)
    for failure in said:
        sizes = [len(text) for text in (failure.message, failure.type, failure.detail)]
        assert sizes == [4 << 10, 256, 64 << 10]
        assert set(failure.detail) == {"d"}, "its end is kept"
