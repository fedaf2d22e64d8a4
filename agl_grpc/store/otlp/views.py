"""OTLP's trace request with spans and resources as the bytes that travelled."""

from __future__ import annotations

from typing import Any

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from agl_grpc.model.raw import BYTES, make_views

TRACES = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"]
LOGS = logs_service_pb2.DESCRIPTOR.services_by_name["LogsService"]
METRICS = metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"]

_CLASSES = make_views(
    "agl_grpc/store/otlp/raw.proto",
    "agl_grpc.otlp",
    {
        "RawScopeSpans": (trace_pb2.ScopeSpans.DESCRIPTOR, {"spans": BYTES}),
        "RawResourceSpans": (
            trace_pb2.ResourceSpans.DESCRIPTOR,
            {"scope_spans": "RawScopeSpans", "resource": BYTES},
        ),
        "RawExportTraceServiceRequest": (
            trace_service_pb2.ExportTraceServiceRequest.DESCRIPTOR,
            {"resource_spans": "RawResourceSpans"},
        ),
    },
)

RawTraceRequest: Any = _CLASSES["RawExportTraceServiceRequest"]
"""ExportTraceServiceRequest whose spans and resources are bytes."""
