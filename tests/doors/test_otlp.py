"""OTLP: spans of the stock OpenTelemetry SDK, by gRPC and by HTTP, and what bad ones are told."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

from agl_grpc.sample.build import build_attempt
from agl_grpc.sample.types import AttemptRecord, SampleRules
from agl_grpc.store import errors
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import reward_pb2, store_service_pb2
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub

PROTOBUF = {"Content-Type": "application/x-protobuf"}


async def begin(server: StoreServer) -> Any:
    """An attempt without a lease, and its credential."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = StoreServiceStub(channel)
        request = store_service_pb2.StartRolloutRequest()
        request.rollout.input.data = b"1"
        return await stub.StartRollout(request)


async def stored(server: StoreServer, rollout_id: str) -> list[Any]:
    """The rollout's spans."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = StoreServiceStub(channel)
        return list((await stub.ListSpans(store_service_pb2.ListSpansRequest(rollout_id=rollout_id))).spans)


def request_of(attempt: Any, *span_ids: bytes, **fields: Any) -> trace_service_pb2.ExportTraceServiceRequest:
    """An OTLP request for one attempt."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    for name, value in (("rollout_id", attempt.rollout_id), ("attempt_id", attempt.attempt_id)):
        of_resource.resource.attributes.add(key=f"agentlightning.{name}").value.string_value = value
    scope = of_resource.scope_spans.add()
    scope.scope.name, scope.scope.version = "lib", "1.2"
    for span_id in span_ids:
        scope.spans.add(trace_id=b"t" * 16, span_id=span_id, name="step", start_time_unix_nano=5, **fields)
    return request


def emit(exporter: SpanExporter, attempt: Any) -> None:
    """What an instrumented program does: two nested spans with attributes and an event."""
    resource = Resource.create(
        {
            "service.name": "agent",
            "agentlightning.rollout_id": attempt.rollout_id,
            "agentlightning.attempt_id": attempt.attempt_id,
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("lib", "1.2")
    with tracer.start_as_current_span("outer", attributes={"n": 1, "texts": ["a", "b"]}) as outer:
        outer.add_event("thing", {"e": 0.5})
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.response.model": "m",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.response.finish_reasons": ("stop",),
            "prompt_token_ids": (1, 2),
            "response_token_ids": (3, 4),
        }
        with tracer.start_as_current_span("chat m", kind=trace.SpanKind.CLIENT, attributes=attributes):
            pass
    provider.shutdown()


EXPORTERS: dict[str, Callable[[StoreServer], SpanExporter]] = {
    "grpc": lambda server: GrpcExporter(endpoint=f"http://{server.address}", insecure=True),
    "http": lambda server: HttpExporter(endpoint=f"{server.url}/v1/traces"),
    "gzip": lambda server: HttpExporter(endpoint=f"{server.url}/v1/traces", compression=Compression.Gzip),
}


@pytest.mark.parametrize("kind", EXPORTERS)
async def test_the_stock_exporters_deliver(memory: StoreServer, kind: str) -> None:
    attempt = (await begin(memory)).rollout.attempt
    await asyncio.to_thread(emit, EXPORTERS[kind](memory), attempt)
    chat, outer = await stored(memory, attempt.rollout_id)
    assert (outer.span.name, outer.sequence_id, chat.sequence_id) == ("outer", 2, 1)
    assert chat.span.parent_span_id == outer.span.span_id
    assert (outer.span.scope_name, outer.span.scope_version) == ("lib", "1.2")
    assert {entry.key for entry in outer.span.resource.attributes} >= {"service.name"}
    assert outer.span.events[0].name == "thing"
    call = chat.span.model_call
    assert (call.model, call.api, call.sampling.temperature) == ("m", "chat.completions", 0.5)
    assert list(call.prompt.token_ids) == [1, 2]
    assert list(call.choices[0].token_ids) == [3, 4]
    assert call.choices[0].finish_reason == "stop"
    assert call.untrainable_reason == "its span has no logprobs"


SAID = {"agentlightning.policy_version": 7, "agentlightning.logprobs": "processed"}


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        (SAID, ""),
        ({**SAID, "agentlightning.policy_version": "7"}, ""),
        (
            {**SAID, "agentlightning.policy_version": "new"},
            "its span does not say which weights sampled it: no version in agentlightning.policy_version",
        ),
        (
            {"agentlightning.policy_version": 7},
            "its span does not say of what its logprobs are: raw or processed in agentlightning.logprobs",
        ),
        ({**SAID, "agentlightning.mode": "val"}, None),
    ],
)
async def test_a_call_that_says_its_weights_is_trained(
    memory: StoreServer, attributes: dict[str, Any], reason: str | None
) -> None:
    attempt = (await begin(memory)).rollout.attempt
    request = request_of(attempt, b"thespan1")
    (span,) = request.resource_spans[0].scope_spans[0].spans
    logprobs = json.dumps([{"logprob": -0.5}, {"logprob": -1.5}])
    ids = {"prompt_token_ids": "[1, 2]", "response_token_ids": "[3, 4]", "logprobs.content": logprobs}
    for key, value in {**ids, **attributes}.items():
        entry = span.attributes.add(key=key)
        setattr(entry.value, "int_value" if isinstance(value, int) else "string_value", value)
    async with grpc.aio.insecure_channel(memory.address) as channel:
        await trace_service_pb2_grpc.TraceServiceStub(channel).Export(request)  # type: ignore[no-untyped-call]  # stubs of others
    (found,) = await stored(memory, attempt.rollout_id)
    reward = reward_pb2.Reward(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id, value=1.0)
    record = AttemptRecord(attempt.rollout_id, attempt.attempt_id, "", [found], [reward])
    made = build_attempt(record, SampleRules())
    if reason == "":
        assert [row.policy_versions[row.response_mask == 1].tolist() for row in made.rows] == [[7, 7]]
    else:
        assert made.rows == []
        assert found.span.model_call.untrainable_reason == (reason or "")


async def test_bad_spans_do_not_spoil_good_ones(server: StoreServer) -> None:
    attempt = (await begin(server)).rollout.attempt
    request = request_of(attempt, b"goodspan", bytes(8), b"short", b"alsogood")
    foreign = request_of(attempt, b"foreign!")
    foreign.resource_spans[0].resource.attributes[1].value.string_value = "at-none"
    homeless = request_of(attempt, b"homeless")
    del homeless.resource_spans[0].resource.attributes[:]
    request.resource_spans.extend([*foreign.resource_spans, *homeless.resource_spans])
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = trace_service_pb2_grpc.TraceServiceStub(channel)
        answer = await stub.Export(request)
    assert answer.partial_success.rejected_spans == 4
    assert "span_id must be 8 bytes" in answer.partial_success.error_message
    assert {one.span.span_id for one in await stored(server, attempt.rollout_id)} == {
        b"goodspan",
        b"alsogood",
    }


async def test_a_span_may_say_whose_it_is(memory: StoreServer) -> None:
    first, second = [(await begin(memory)).rollout.attempt for _ in range(2)]
    request = request_of(first, b"of-first", b"ofsecond")
    span = request.resource_spans[0].scope_spans[0].spans[1]
    for name, value in (("rollout_id", second.rollout_id), ("attempt_id", second.attempt_id)):
        span.attributes.add(key=f"agentlightning.{name}").value.string_value = value
    span.attributes.add(key="agentlightning.span_sequence_id").value.int_value = 7
    async with httpx.AsyncClient(base_url=memory.url) as http:
        answer = await http.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF)
    assert (answer.status_code, answer.content) == (200, b"")
    assert [one.span.span_id for one in await stored(memory, first.rollout_id)] == [b"of-first"]
    assert [one.sequence_id for one in await stored(memory, second.rollout_id)] == [7]


async def test_an_agents_credential_is_enough(memory: StoreServer) -> None:
    started = await begin(memory)
    request = request_of(started.rollout.attempt, b"mine-own")
    del request.resource_spans[0].resource.attributes[:]
    bearer = {**PROTOBUF, "Authorization": f"Bearer {started.attempt_credential}"}
    async with httpx.AsyncClient(base_url=memory.url) as http:
        answer = await http.post("/v1/traces", content=request.SerializeToString(), headers=bearer)
        assert answer.status_code == 200
        foreign = request_of((await begin(memory)).rollout.attempt, b"foreign!")
        refused = await http.post("/v1/traces", content=foreign.SerializeToString(), headers=bearer)
        told = trace_service_pb2.ExportTraceServiceResponse.FromString(refused.content)
        assert told.partial_success.rejected_spans == 1
        lists = await http.get("/agl/v1/rollouts", headers={"Authorization": bearer["Authorization"]})
        assert lists.status_code == 403
    assert len(await stored(memory, started.rollout.rollout.rollout_id)) == 1


async def test_json_as_browsers_and_scripts_send_it(memory: StoreServer) -> None:
    attempt = (await begin(memory)).rollout.attempt
    span = {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": "eee19b7ec3c1b174",
        "parentSpanId": "eee19b7ec3c1b173",
        "name": "from json",
        "kind": 2,
        "startTimeUnixNano": "1544712660000000000",
        "endTimeUnixNano": "1544712661000000000",
        "attributes": [{"key": "n", "value": {"intValue": "3"}}],
        "status": {"code": 2, "message": "sad"},
        "somethingNew": True,
    }
    ids = {"rollout_id": attempt.rollout_id, "attempt_id": attempt.attempt_id}
    attributes = [{"key": f"agentlightning.{k}", "value": {"stringValue": v}} for k, v in ids.items()]
    bad = [{**span, "spanId": "xyz"}, {**span, "spanId": "eee19b7ec3c1b175", "startTimeUnixNano": "soon"}, 3]
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes},
                "scopeSpans": [{"scope": {"name": "lib"}, "spans": [span, *bad]}],
            }
        ]
    }
    async with httpx.AsyncClient(base_url=memory.url) as http:
        packed = gzip.compress(json.dumps(body).encode())
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        answer = await http.post("/v1/traces", content=packed, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "3"
    assert "spanId must be hex digits" in answer.json()["partialSuccess"]["errorMessage"]
    (kept,) = await stored(memory, attempt.rollout_id)
    assert kept.span.span_id.hex() == span["spanId"]
    assert kept.span.parent_span_id.hex() == span["parentSpanId"]
    assert (kept.span.status.message, kept.span.scope_name) == ("sad", "lib")


async def test_what_is_not_kept_is_said_to_be_refused(memory: StoreServer) -> None:
    logs = logs_service_pb2.ExportLogsServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add(severity_text="INFO")
    metrics = metrics_service_pb2.ExportMetricsServiceRequest()
    metric = metrics.resource_metrics.add().scope_metrics.add().metrics.add(name="m")
    metric.gauge.data_points.add(as_int=1)
    async with grpc.aio.insecure_channel(memory.address) as channel:
        for_logs: Any = logs_service_pb2_grpc.LogsServiceStub(channel)
        for_metrics: Any = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        assert (await for_logs.Export(logs)).partial_success.rejected_log_records == 1
        assert (await for_metrics.Export(metrics)).partial_success.rejected_data_points == 1
    async with httpx.AsyncClient(base_url=memory.url) as http:
        answer = await http.post("/v1/logs", content=logs.SerializeToString(), headers=PROTOBUF)
        told = logs_service_pb2.ExportLogsServiceResponse.FromString(answer.content)
        assert (answer.status_code, told.partial_success.rejected_log_records) == (200, 1)
        answer = await http.post("/v1/metrics", json={"resourceMetrics": []})
        assert (answer.status_code, answer.json()) == (200, {})
        assert (await http.post("/v1/development/profiles")).status_code == 501


async def test_requests_that_cannot_be_read(memory: StoreServer) -> None:
    async with httpx.AsyncClient(base_url=memory.url) as http:
        cases: list[tuple[bytes, dict[str, str], int]] = [
            (b"", PROTOBUF, 200),
            (b"\xff\xff", PROTOBUF, 400),
            (gzip.compress(b"x" * 99)[:-9], {**PROTOBUF, "Content-Encoding": "gzip"}, 400),
            (gzip.compress(b"") * 2, {**PROTOBUF, "Content-Encoding": "gzip"}, 400),
            (gzip.compress(bytes(65 << 20), 1), {**PROTOBUF, "Content-Encoding": "gzip"}, 413),
            (b"{", {"Content-Type": "application/json"}, 400),
            (b'{"resourceSpans": 3}', {"Content-Type": "application/json"}, 400),
            (b"x", {"Content-Type": "text/plain"}, 415),
        ]
        for body, headers, status in cases:
            answer = await http.post("/v1/traces", content=body, headers=headers)
            assert answer.status_code == status, (body, answer.text)
            if status == 200:
                continue
            if headers is PROTOBUF or "Content-Encoding" in headers:
                assert answer.headers["content-type"] == "application/x-protobuf"
                assert status_pb2.Status.FromString(answer.content).message
            else:
                assert answer.json()["message"]
        wrong: list[tuple[Any, str]] = [
            ({"resourceSpans": 3}, "resourceSpans"),
            ({"resourceSpans": [{"scopeSpans": [3]}]}, "resourceSpans[0].scopeSpans[0]"),
            ({"resourceSpans": [{"resource": 3}]}, "resourceSpans[0].resource"),
        ]
        for value, field in wrong:
            answer = await http.post("/v1/traces", json=value)
            told = answer.json()
            assert (answer.status_code, told["reason"], told["field"]) == (400, "BODY_MALFORMED", field)


async def test_overload_says_when_to_try_again() -> None:
    config = ServeConfig(port=0, http_port=0, database=None, grace=1.0, span_queue_bytes=0)
    server = await StoreServer.start(config)
    try:
        attempt = (await begin(server)).rollout.attempt
        request = request_of(attempt, b"refused!")
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = trace_service_pb2_grpc.TraceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Export(request)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata() or ())
        retry = error_details_pb2.RetryInfo.FromString(trailers[errors.RETRY_TRAILER])
        assert retry.retry_delay.ToMilliseconds() == 500
        details = status_pb2.Status.FromString(trailers[errors.STATUS_TRAILER]).details
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)
        async with httpx.AsyncClient(base_url=server.url) as http:
            answer = await http.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    finally:
        await server.stop()


async def test_more_spans_than_one_message_holds(memory: StoreServer) -> None:
    attempt = (await begin(memory)).rollout.attempt
    request = request_of(attempt, *(number.to_bytes(8, "big") for number in range(1, 10_502)))
    async with grpc.aio.insecure_channel(memory.address) as channel:
        stub: Any = trace_service_pb2_grpc.TraceServiceStub(channel)
        assert not (await stub.Export(request)).HasField("partial_success")
        statistics: Any = StoreServiceStub(channel)
        assert (
            await statistics.GetStatistics(store_service_pb2.GetStatisticsRequest())
        ).total_spans == 10_501
