"""Adapters: the spans of an attempt as what an algorithm learns from."""

from __future__ import annotations

from agl_grpc.sample.adapter.base import Adapter, OtelTraceAdapter, TraceAdapter, Triplet
from agl_grpc.sample.adapter.messages import TraceToMessages
from agl_grpc.sample.adapter.proxy import LlmProxyTraceToTriplet
from agl_grpc.sample.adapter.rewards import RewardMatchPolicy
from agl_grpc.sample.adapter.triplets import TracerTraceToTriplet

__all__ = [
    "Adapter",
    "LlmProxyTraceToTriplet",
    "OtelTraceAdapter",
    "RewardMatchPolicy",
    "TraceAdapter",
    "TraceToMessages",
    "TracerTraceToTriplet",
    "Triplet",
]
