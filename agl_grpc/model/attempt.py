"""One try at a rollout, and the lease by which a worker holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from agl_grpc.model.enums import AttemptStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.times import from_duration, from_timestamp, read_time, to_duration, to_timestamp
from agl_grpc.model.value import from_key_values, to_key_values
from agl_grpc.v1 import attempt_pb2


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One try at a rollout; its id is the fencing epoch: each delivery makes a new one.

    Times are seconds since the epoch by the store's clock; ``sequence_id`` counts a rollout's
    attempts from 1.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float = 0.0
    end_time: float | None = None
    status: AttemptStatus = AttemptStatus.PREPARING
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: dict[str, Any] | None = None
    failure: Failure | None = None
    resources_id: str | None = None
    resources_version: int = 0
    leased: bool = False
    sealed: bool = False
    seal_time: float | None = None
    capture_incomplete: bool = False
    open_calls: int = 0
    lease_lost: bool = False
    spans_evicted: bool = False

    def __post_init__(self) -> None:
        self.status = AttemptStatus.parse(self.status)

    @classmethod
    def from_proto(cls, message: attempt_pb2.Attempt) -> Self:
        """Read the stored form."""
        has = message.HasField
        return cls(
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            sequence_id=message.sequence_id,
            start_time=from_timestamp(message.start_time),
            end_time=read_time(message, "end_time"),
            status=AttemptStatus.from_proto(message.status) or AttemptStatus.PREPARING,
            worker_id=message.worker_id or None,
            last_heartbeat_time=read_time(message, "last_heartbeat_time"),
            metadata=from_key_values(message.metadata),
            failure=Failure.from_proto(message.failure) if has("failure") else None,
            resources_id=message.resources_id or None,
            resources_version=message.resources_version,
            leased=message.leased,
            sealed=message.sealed,
            seal_time=read_time(message, "seal_time"),
            capture_incomplete=message.capture_incomplete,
            open_calls=message.open_calls,
            lease_lost=message.lease_lost,
            spans_evicted=message.spans_evicted,
        )

    def to_proto(self) -> attempt_pb2.Attempt:
        """Write the stored form."""
        return attempt_pb2.Attempt(
            rollout_id=self.rollout_id,
            attempt_id=self.attempt_id,
            sequence_id=self.sequence_id,
            start_time=to_timestamp(self.start_time),
            end_time=to_timestamp(self.end_time),
            status=self.status.number,
            worker_id=self.worker_id or "",
            last_heartbeat_time=to_timestamp(self.last_heartbeat_time),
            metadata=to_key_values(self.metadata, "metadata"),
            failure=self.failure.to_proto() if self.failure else None,
            resources_id=self.resources_id or "",
            resources_version=self.resources_version,
            leased=self.leased,
            sealed=self.sealed,
            seal_time=to_timestamp(self.seal_time),
            capture_incomplete=self.capture_incomplete,
            open_calls=self.open_calls,
            lease_lost=self.lease_lost,
            spans_evicted=self.spans_evicted,
        )


@dataclass(slots=True, kw_only=True)
class Lease:
    """A delivery of work: whoever holds the token, and nobody else, may renew, complete or release it.

    ``duration`` is in seconds, counted by the holder from when it sent the request that was answered.
    ``attempt_credential`` is for the agent: it may append spans and call the model, nothing else.
    """

    rollout_id: str
    attempt_id: str
    lease_token: bytes
    duration: float = 30.0
    attempt_credential: str = ""

    @classmethod
    def from_proto(cls, message: attempt_pb2.Lease) -> Self:
        """Read the stored form."""
        return cls(
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            lease_token=message.lease_token,
            duration=from_duration(message.duration),
            attempt_credential=message.attempt_credential,
        )

    def to_proto(self) -> attempt_pb2.Lease:
        """Write the stored form."""
        return attempt_pb2.Lease(
            rollout_id=self.rollout_id,
            attempt_id=self.attempt_id,
            lease_token=self.lease_token,
            duration=to_duration(self.duration),
            attempt_credential=self.attempt_credential,
        )
