"""The client of the store: every method under one name."""

from __future__ import annotations

from agl_grpc.client.attempts import AttemptCalls
from agl_grpc.client.blobs import BlobCalls
from agl_grpc.client.leases import LeaseCalls
from agl_grpc.client.policies import PolicyCalls
from agl_grpc.client.resources import ResourceCalls
from agl_grpc.client.rewards import RewardCalls
from agl_grpc.client.rollouts import RolloutCalls
from agl_grpc.client.runs import RunCalls
from agl_grpc.client.spans import SpanCalls
from agl_grpc.client.training import TrainingCalls
from agl_grpc.client.workers import WorkerCalls


class StoreClient(
    RolloutCalls,
    AttemptCalls,
    SpanCalls,
    RewardCalls,
    ResourceCalls,
    WorkerCalls,
    LeaseCalls,
    RunCalls,
    TrainingCalls,
    PolicyCalls,
    BlobCalls,
):
    """The store, as coroutines.

    Every call keeps one request id over all its tries, so that a try whose answer was lost changes nothing
    twice. Calls are tried again while the store is away, until the retry policy's time is over (120 s by
    default); then they raise `StoreUnavailable`. What the store refuses raises the fitting `StoreError`;
    getters answer ``None`` for unknown ids. A client belongs to one event loop; from other threads use
    `SyncStoreClient`.
    """
