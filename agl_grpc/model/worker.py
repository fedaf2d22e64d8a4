"""Processes that execute rollouts, what they hold, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from agl_grpc.model.enums import CommandKind, WorkerStatus
from agl_grpc.model.times import from_duration, from_timestamp, read_time
from agl_grpc.model.value import from_key_values, from_labels
from agl_grpc.v1 import worker_pb2


@dataclass(slots=True, kw_only=True)
class Worker:
    """A worker as the store sees it. Times are seconds since the epoch; ``None`` = never."""

    worker_id: str
    status: WorkerStatus = WorkerStatus.UNKNOWN
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None
    lease_count: int = 0
    idle_reason: str | None = None
    queues: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, message: worker_pb2.Worker) -> Self:
        """Read the stored form."""
        return cls(
            worker_id=message.worker_id,
            status=WorkerStatus.from_proto(message.status) or WorkerStatus.UNKNOWN,
            heartbeat_stats=from_key_values(message.heartbeat_stats) or None,
            last_heartbeat_time=read_time(message, "last_heartbeat_time"),
            last_dequeue_time=read_time(message, "last_dequeue_time"),
            last_busy_time=read_time(message, "last_busy_time"),
            last_idle_time=read_time(message, "last_idle_time"),
            current_rollout_id=message.current_rollout_id or None,
            current_attempt_id=message.current_attempt_id or None,
            lease_count=message.lease_count,
            idle_reason=message.idle_reason or None,
            queues=list(message.queues),
            labels=from_labels(message.labels),
        )


@dataclass(slots=True, kw_only=True)
class LeaseInfo:
    """A live lease as an operator sees it; the token is never shown."""

    rollout_id: str
    attempt_id: str
    worker_id: str
    session_id: str
    grant_time: float
    expire_time: float
    duration: float
    run_id: str

    @classmethod
    def from_proto(cls, message: worker_pb2.LeaseInfo) -> Self:
        """Read the stored form."""
        return cls(
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            worker_id=message.worker_id,
            session_id=message.session_id,
            grant_time=from_timestamp(message.grant_time),
            expire_time=from_timestamp(message.expire_time),
            duration=from_duration(message.duration),
            run_id=message.run_id,
        )


@dataclass(slots=True, frozen=True, kw_only=True)
class WorkerCommand:
    """An order to a worker; the store repeats it until it is acknowledged.

    ``rollout_id`` and ``attempt_id`` belong to ``cancel``, ``resources_id`` and its version to ``resources``.
    """

    command_id: int
    kind: CommandKind
    rollout_id: str = ""
    attempt_id: str = ""
    resources_id: str = ""
    resources_version: int = 0
    reason: str = ""

    @classmethod
    def from_proto(cls, message: worker_pb2.WorkerCommand) -> Self | None:
        """Read the contract's form; ``None`` for a kind that this version does not know."""
        kind = CommandKind.from_proto(message.kind)
        if kind is None:
            return None
        return cls(
            command_id=message.command_id,
            kind=kind,
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            resources_id=message.resources_id,
            resources_version=message.resources_version,
            reason=message.reason,
        )
