"""Serves OTLP's Export of traces; logs and metrics are not kept, and their senders are told so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from agl_grpc.model import semconv
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.service import Parser
from agl_grpc.store.otlp import views
from agl_grpc.store.otlp.spans import SpanRequest, requests_of
from agl_grpc.v1 import store_service_pb2

Append = Callable[[Any, Call], Awaitable[store_service_pb2.AppendSpansResponse]]
"""Carries AppendSpans out."""

_NOT_KEPT = "the agl-grpc store keeps traces only; switch this exporter off"
_HOMELESS = (
    f"it does not say whose it is: set {semconv.ROLLOUT_ID} and {semconv.ATTEMPT_ID} "
    "as attributes of the resource or of the span"
)


class TraceHandlers:
    """Serves TraceService.

    Args:
        append: Stores spans.
    """

    def __init__(self, append: Append) -> None:
        self._append = append

    async def export(self, request: Any, call: Call) -> trace_service_pb2.ExportTraceServiceResponse:
        """Stores a RawTraceRequest; good spans are kept, whatever their neighbours are."""
        asked = list(requests_of(request))
        answers = await asyncio.gather(*(self._append(one, call) for one in asked))
        refused = Refusals()
        for one, answer in zip(asked, answers, strict=True):
            refused.add(one, answer)
        response = trace_service_pb2.ExportTraceServiceResponse()
        refused.tell(response)
        return response


class Refusals:
    """How many spans of a request were refused, and why the first one was."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, request: SpanRequest, answer: store_service_pb2.AppendSpansResponse) -> None:
        """Counts what was refused of a request."""
        for one in answer.rejected:
            group = request.groups[one.group_index]
            whole = one.index < 0
            message = one.status.message
            if whole and not group.attempt_id:
                message = _HOMELESS
            self.note(len(group.spans) if whole else 1, message)

    def note(self, count: int, message: str) -> None:
        """Counts refused spans."""
        self.count += count
        self.first = self.first or message

    def tell(self, response: trace_service_pb2.ExportTraceServiceResponse) -> None:
        """Writes the partial success; nothing when all is well."""
        if self.count:
            response.partial_success.rejected_spans = self.count
            noun = "span was" if self.count == 1 else "spans were"
            response.partial_success.error_message = f"{self.count} {noun} refused; the first: {self.first}"


class LogsHandlers:
    """Serves LogsService."""

    async def export(self, request: Any, _call: Call) -> logs_service_pb2.ExportLogsServiceResponse:
        """Refuses every record, so that nobody thinks that it was kept."""
        response = logs_service_pb2.ExportLogsServiceResponse()
        count = sum(len(scope.log_records) for one in request.resource_logs for scope in one.scope_logs)
        if count:
            response.partial_success.rejected_log_records = count
            response.partial_success.error_message = _NOT_KEPT
        return response


class MetricsHandlers:
    """Serves MetricsService."""

    async def export(self, request: Any, _call: Call) -> metrics_service_pb2.ExportMetricsServiceResponse:
        """Refuses every data point, so that nobody thinks that it was kept."""
        return refuse_metrics(request)


def refuse_metrics(
    request: metrics_service_pb2.ExportMetricsServiceRequest,
) -> metrics_service_pb2.ExportMetricsServiceResponse:
    """The answer that says how many data points were not kept; a plain one when there were none."""
    response = metrics_service_pb2.ExportMetricsServiceResponse()
    metrics = [
        metric for one in request.resource_metrics for scope in one.scope_metrics for metric in scope.metrics
    ]
    count = sum(_points(metric) for metric in metrics)
    if count:
        response.partial_success.rejected_data_points = count
        response.partial_success.error_message = _NOT_KEPT
    return response


def _points(metric: Any) -> int:
    kind = metric.WhichOneof("data")
    return 0 if kind is None else len(getattr(metric, kind).data_points)


def otlp_services(append: Append) -> Mapping[ServiceDescriptor, Sequence[object]]:
    """OTLP's services with what serves them."""
    return {
        views.TRACES: [TraceHandlers(append)],
        views.LOGS: [LogsHandlers()],
        views.METRICS: [MetricsHandlers()],
    }


OTLP_PARSERS: Mapping[str, Parser] = {
    views.TRACES.methods[0].full_name: views.RawTraceRequest.FromString,
    views.LOGS.methods[0].full_name: logs_service_pb2.ExportLogsServiceRequest.FromString,
    views.METRICS.methods[0].full_name: metrics_service_pb2.ExportMetricsServiceRequest.FromString,
}
"""Parsers of their requests, by the methods' full names."""
