"""What each method sends: its rpc, its keywords, one request id over all tries, typed errors."""

from __future__ import annotations

import inspect
import re
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.client import (
    InvalidRequest,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    Overloaded,
    RetryPolicy,
    StoreClient,
    StoreError,
    StoreUnavailable,
    SyncStoreClient,
    Unimplemented,
)
from agl_grpc.client.channel import BROKEN_WRITE, is_transient
from agl_grpc.client.rpc_table import RPC_OF
from agl_grpc.model import LLM, EnqueueRolloutRequest, RolloutStatus, Span
from agl_grpc.v1 import common_pb2, rollout_pb2
from agl_grpc.v1 import store_service_pb2 as pb
from tests.client.recording import Failing, recording_server

SPAN = Span(rollout_id="ro-1", attempt_id="at-1", name="work")
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "start_rollout": ((), {"input": 1, "mode": "train", "worker_id": "w"}),
    "enqueue_rollout": ((), {"input": 1, "resources_id": "rs", "metadata": {"a": 1}}),
    "enqueue_many_rollouts": (([EnqueueRolloutRequest(input=1)],), {}),
    "dequeue_rollout": ((), {"worker_id": "w"}),
    "dequeue_many_rollouts": ((), {"limit": 3, "worker_id": "w"}),
    "start_attempt": (("ro-1",), {"worker_id": "w"}),
    "add_span": ((SPAN,), {}),
    "add_many_spans": (([SPAN],), {}),
    "query_rollouts": ((), {"status_in": ["failed"], "limit": 5, "offset": 1, "sort_by": "start_time"}),
    "query_attempts": (("ro-1",), {"sort_order": "desc"}),
    "query_spans": (("ro-1", "latest"), {"name_contains": "x", "filter_logic": "or"}),
    "query_resources": ((), {"resources_id": "rs"}),
    "query_workers": ((), {"status_in": ["busy"], "worker_id_contains": "w"}),
    "get_rollout_by_id": (("ro-1",), {}),
    "get_latest_attempt": (("ro-1",), {}),
    "get_resources_by_id": (("rs",), {}),
    "get_latest_resources": ((), {}),
    "get_worker_by_id": (("w",), {}),
    "get_next_span_sequence_id": (("ro-1", "at-1"), {}),
    "get_many_span_sequence_ids": (([("ro-1", "at-1")],), {}),
    "wait_for_rollouts": ((), {"rollout_ids": ["ro-1"], "timeout": 0.0}),
    "add_resources": (({"llm": LLM(endpoint="http://x/v1", model="m")},), {}),
    "update_resources": (("rs", {}), {}),
    "update_rollout": (("ro-1",), {"status": "cancelled", "metadata": None}),
    "update_attempt": (("ro-1", "latest"), {"status": "failed"}),
    "update_worker": (("w",), {"heartbeat_stats": {"cpu": 0.5}}),
    "statistics": ((), {}),
    "capabilities": ((), {}),
}


def _answer(path: str, request: Message, context: object) -> Message | None:
    """The least that a store would answer."""
    match request:
        case pb.EnqueueRolloutsRequest():
            return pb.EnqueueRolloutsResponse(rollouts=[{"rollout_id": "ro-1"}])  # type: ignore[list-item]  # a dict makes a message
        case pb.AppendSpansRequest():
            return pb.AppendSpansResponse(stored=1, sequence_ids=[7])
        case pb.ReserveSpanSequencesRequest():
            return pb.ReserveSpanSequencesResponse(sequence_ids=[7])
    return None


def test_every_name_of_the_list_is_in_the_table_and_is_a_coroutine() -> None:
    assert set(CALLS) | {"add_otel_span"} == set(RPC_OF)
    for name in RPC_OF:
        assert inspect.iscoroutinefunction(getattr(StoreClient, name)), name


@pytest.mark.parametrize("name", CALLS)
async def test_each_name_calls_its_rpc(name: str) -> None:
    args, kwargs = CALLS[name]
    async with recording_server(_answer) as server, StoreClient(server.target) as client:
        await getattr(client, name)(*args, **kwargs)
    assert [path for path, _ in server.calls] == [RPC_OF[name]]


async def test_an_otel_span_is_appended() -> None:
    from opentelemetry.sdk.trace import TracerProvider

    span = TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("work", attributes={"a": [1, 2]})
    span.end()
    async with recording_server(_answer) as server, StoreClient(server.target) as client:
        stored = await client.add_otel_span("ro-1", "at-1", span, sequence_id=7)  # type: ignore[arg-type]  # the SDK's
    assert stored is not None
    assert (stored.name, stored.attributes, stored.sequence_id) == ("work", {"a": [1, 2]}, 7)
    assert [path for path, _ in server.calls] == [RPC_OF["add_otel_span"]]


def test_the_sync_face_has_every_method_of_the_async_one() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    helpers = {"bound", "call", "query", "read_all", "run_or_default"}
    assert public(StoreClient) - helpers - public(SyncStoreClient) == set()


async def test_a_server_of_another_version_is_named_and_asked_once() -> None:
    def other(path: str, request: Message, context: object) -> object:
        if isinstance(request, pb.GetServerInfoRequest):
            return pb.GetServerInfoResponse(server_version="9.0", contract_version="v9")
        return Failing(grpc.StatusCode.UNIMPLEMENTED)

    async with recording_server(other) as server, StoreClient(server.target) as client:
        with pytest.raises(Unimplemented, match=r"version 9\.0 and speaks contract v9, not v1") as caught:
            await client.require()
        assert caught.value.metadata["contract_version"] == "v9"
        with pytest.raises(Unimplemented):
            await client.enqueue_rollout({"a": 1})
    assert len(server.calls) == 2


async def test_only_what_is_given_is_updated() -> None:
    async with recording_server() as server, StoreClient(server.target) as client:
        await client.update_rollout("ro-1", status=RolloutStatus.CANCELLED, metadata=None)
    ((_, request),) = server.calls
    assert isinstance(request, pb.UpdateRolloutRequest)
    assert set(request.update_mask.paths) == {"status", "metadata"}
    assert not request.rollout.metadata


async def test_an_empty_list_of_allowed_values_matches_nothing() -> None:
    async with recording_server() as server, StoreClient(server.target) as client:
        assert list(await client.query_rollouts(status_in=[])) == []
        assert list(await client.query_rollouts(rollout_id_in=[], status_in=["failed"])) == []
    assert server.calls == []


async def test_a_try_that_fails_is_made_again_under_the_same_request_id() -> None:
    tries = 0

    def fail_twice(path: str, request: Message, context: object) -> object:
        nonlocal tries
        tries += 1
        return Failing(grpc.StatusCode.UNAVAILABLE) if tries < 3 else _answer(path, request, context)

    async with recording_server(fail_twice) as server, StoreClient(server.target) as client:
        await client.enqueue_rollout({"a": 1})
        await client.enqueue_rollout({"a": 1})
    ids = [
        request.request_id for _, request in server.calls if isinstance(request, pb.EnqueueRolloutsRequest)
    ]
    assert len(ids) == 4
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert all(ids)


async def test_a_store_that_stays_away_is_one_clear_line(nowhere: str) -> None:
    async with StoreClient(nowhere, retry=RetryPolicy(timeout=0.3)) as client:
        with pytest.raises(
            StoreUnavailable, match=rf"the store at {re.escape(nowhere)} cannot be reached"
        ) as caught:
            await client.statistics()
    assert "\n" not in str(caught.value)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def _status(code: grpc.StatusCode, reason: str, metadata: dict[str, str], wait: float = 0.0) -> bytes:
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="agl-grpc", metadata=metadata)]
    status = status_pb2.Status(code=code.value[0], message="as the store said")
    packed = AnyMessage()
    packed.Pack(details[0])
    status.details.append(packed)
    if wait:
        retry = AnyMessage()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=Duration(nanos=int(wait * 1e9))))
        status.details.append(retry)
    return status.SerializeToString()


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "ENTITY_NOT_FOUND", NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST", LeaseLost),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", InvalidRequest),
        (grpc.StatusCode.FAILED_PRECONDITION, "A_REASON_OF_THE_FUTURE", StoreError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", Overloaded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", MessageTooLarge),
    ],
)
async def test_errors_are_typed_by_their_reason(
    code: grpc.StatusCode, reason: str, kind: type[StoreError]
) -> None:
    def refuse(path: str, request: Message, context: grpc.aio.ServicerContext) -> object:
        details = _status(code, reason, {"field": "x"})
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        return Failing(code, "as the store said")

    async with recording_server(refuse) as server, StoreClient(server.target) as client:
        with pytest.raises(kind) as caught:
            await client.start_attempt("ro-1")
    assert type(caught.value) is kind
    assert (caught.value.reason, caught.value.metadata) == (reason, {"field": "x"})
    assert str(caught.value) == "as the store said"
    assert len(server.calls) == 1


async def test_a_message_over_the_limit_is_named_and_never_sent() -> None:
    def answer(path: str, request: Message, context: object) -> object:
        raise AssertionError(f"{path} was called")

    spec = rollout_pb2.RolloutSpec(input=common_pb2.Payload(data=bytes(65 << 20)))
    async with recording_server(answer) as server, StoreClient(server.target) as client:
        request = pb.EnqueueRolloutsRequest(rollouts=[spec])
        with pytest.raises(MessageTooLarge) as caught:
            await client.call(client.bound.store.EnqueueRollouts, request)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata == {"limit_bytes": str(64 << 20)}
    assert not server.calls


async def test_overload_is_retried_when_the_store_says_when() -> None:
    tries = 0

    def overloaded_once(path: str, request: Message, context: grpc.aio.ServicerContext) -> object:
        nonlocal tries
        tries += 1
        if tries > 1:
            return None
        details = _status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", {}, wait=0.01)
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        return Failing(grpc.StatusCode.RESOURCE_EXHAUSTED)

    async with recording_server(overloaded_once) as server, StoreClient(server.target) as client:
        await client.statistics()
    assert len(server.calls) == 2


async def test_getters_answer_none_for_unknown_ids() -> None:
    def unknown(path: str, request: Message, context: object) -> object:
        return Failing(grpc.StatusCode.NOT_FOUND)

    async with recording_server(unknown) as server, StoreClient(server.target) as client:
        assert await client.get_rollout_by_id("x") is None
        assert await client.get_latest_attempt("x") is None
        assert await client.get_resources_by_id("x") is None
        assert await client.get_worker_by_id("x") is None
        assert list(await client.query_spans("x")) == []
        with pytest.raises(NotFound):
            await client.update_attempt("x", "latest", status="failed")


async def test_a_client_on_another_loop_says_so() -> None:
    import asyncio

    async with recording_server() as server, StoreClient(server.target) as client:
        await client.statistics()

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(client.statistics())  # type: ignore[arg-type]  # raises before it is awaited

        await asyncio.to_thread(elsewhere)


@pytest.mark.parametrize(("details", "transient"), [(BROKEN_WRITE, True), ("internal", False)])
def test_a_stream_that_ends_under_a_write_is_opened_again(details: str, transient: bool) -> None:
    """Else five full disks in a row would look like five refusals, and spans would be given up."""
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details
    )
    assert is_transient(error) is transient
