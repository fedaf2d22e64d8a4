"""Tracers: what an agent does, as spans in the store."""

from __future__ import annotations

from agl_grpc.tracer.otel import OtelTracer
from agl_grpc.tracer.trace import Trace

__all__ = ["OtelTracer", "Trace"]
