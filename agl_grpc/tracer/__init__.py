"""Tracers: what an agent does, as spans in the store."""

from __future__ import annotations

from agl_grpc.tracer.agentops import AgentOpsTracer
from agl_grpc.tracer.base import Tracer
from agl_grpc.tracer.otel import OtelTracer, get_active_tracer
from agl_grpc.tracer.trace import Trace

__all__ = ["AgentOpsTracer", "OtelTracer", "Trace", "Tracer", "get_active_tracer"]
