"""Clients of the store: async, sync, streams of spans and of leases, watches."""

from __future__ import annotations

from agl_grpc.client.channel import RetryPolicy
from agl_grpc.client.errors import (
    AlreadyExists,
    CursorCompacted,
    DeltaBaseUnknown,
    IllegalTransition,
    InvalidRequest,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    NotPermitted,
    Overloaded,
    SpansEvicted,
    StoreError,
    StoreUnavailable,
    StreamFenced,
    TokensMalformed,
    TrainerFenced,
    Unimplemented,
)
from agl_grpc.client.filters import rollout_filter
from agl_grpc.client.io_thread import ForkedProcess, IoThread, io_thread
from agl_grpc.client.lease_events import (
    Commanded,
    Connected,
    Delivered,
    Disconnected,
    Idle,
    LeaseEnded,
    LeaseEvent,
)
from agl_grpc.client.lease_stream import LeaseStream
from agl_grpc.client.leases import Completion, LeasedRollout, Renewals
from agl_grpc.client.runs import Capabilities, ServerInfo
from agl_grpc.client.span_buffer import SpanAck, SpanRejection
from agl_grpc.client.span_streamer import SpanStreamer
from agl_grpc.client.span_wire import SpanGroup
from agl_grpc.client.spans import SpansRejected
from agl_grpc.client.store_client import StoreClient
from agl_grpc.client.sync_client import SyncStoreClient
from agl_grpc.client.training import RolloutsUnsealed
from agl_grpc.client.watch import Watched

__all__ = [
    "AlreadyExists",
    "Capabilities",
    "Commanded",
    "Completion",
    "Connected",
    "CursorCompacted",
    "Delivered",
    "DeltaBaseUnknown",
    "Disconnected",
    "ForkedProcess",
    "Idle",
    "IllegalTransition",
    "InvalidRequest",
    "IoThread",
    "LeaseEnded",
    "LeaseEvent",
    "LeaseLost",
    "LeaseStream",
    "LeasedRollout",
    "MessageTooLarge",
    "NotFound",
    "NotPermitted",
    "Overloaded",
    "Renewals",
    "RetryPolicy",
    "RolloutsUnsealed",
    "ServerInfo",
    "SpanAck",
    "SpanGroup",
    "SpanRejection",
    "SpanStreamer",
    "SpansEvicted",
    "SpansRejected",
    "StoreClient",
    "StoreError",
    "StoreUnavailable",
    "StreamFenced",
    "SyncStoreClient",
    "TokensMalformed",
    "TrainerFenced",
    "Unimplemented",
    "Watched",
    "io_thread",
    "rollout_filter",
]
