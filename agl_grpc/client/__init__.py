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
    NotFound,
    NotPermitted,
    Overloaded,
    StoreError,
    StoreUnavailable,
    StreamFenced,
    TokensMalformed,
    TrainerFenced,
    Unimplemented,
)
from agl_grpc.client.filters import rollout_filter
from agl_grpc.client.leases import Completion, LeasedRollout, Renewals
from agl_grpc.client.runs import Capabilities, ServerInfo
from agl_grpc.client.spans import SpansRejected
from agl_grpc.client.store_client import StoreClient
from agl_grpc.client.training import RolloutsUnsealed
from agl_grpc.client.watch import Watched

__all__ = [
    "AlreadyExists",
    "Capabilities",
    "Completion",
    "CursorCompacted",
    "DeltaBaseUnknown",
    "IllegalTransition",
    "InvalidRequest",
    "LeaseLost",
    "LeasedRollout",
    "NotFound",
    "NotPermitted",
    "Overloaded",
    "Renewals",
    "RetryPolicy",
    "RolloutsUnsealed",
    "ServerInfo",
    "SpansRejected",
    "StoreClient",
    "StoreError",
    "StoreUnavailable",
    "StreamFenced",
    "TokensMalformed",
    "TrainerFenced",
    "Unimplemented",
    "Watched",
    "rollout_filter",
]
