"""A unit of work: one task, given to the agent until an attempt ends it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from agl_grpc.model.attempt import Attempt
from agl_grpc.model.enums import AttemptStatus, ResourceBinding, RolloutMode, RolloutStatus, number_of
from agl_grpc.model.failure import Failure
from agl_grpc.model.times import from_timestamp, read_seconds, read_time, to_duration, to_timestamp
from agl_grpc.model.value import (
    from_key_values,
    from_labels,
    from_payload,
    to_key_values,
    to_labels,
    to_payload,
)
from agl_grpc.v1 import attempt_pb2, rollout_pb2

SEED_LABEL = "sampling_seed"
"""Label of a rollout whose model calls get seeds: interceptors make one for each call of it (`seed_of`)."""


def seed_of(*parts: object) -> int:
    """A seed that is made of other things, 0 to 2^31 - 1; the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """Rules of a rollout's life.

    ``timeout_seconds``: longest time one attempt may take from its start; ``None`` = no limit.
    ``unresponsive_seconds``: longest silence (no span, heartbeat or renewal); ``None`` = no limit.
    ``max_attempts``: attempts that may end by themselves, 1 to 1000.
    ``retry_condition``: ends that are retried (``failed``, ``timeout``, ``unresponsive``); empty = none.
    ``max_redeliveries``: after lost leases; ``None`` = 3.
    ``retry_backoff_seconds``: first wait before a retry, doubling up to 60 s; ``None`` = 1 s.
    """

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: Sequence[AttemptStatus | str] = field(default_factory=list)
    max_redeliveries: int | None = None
    retry_backoff_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1")
        self.retry_condition = [AttemptStatus.parse(status) for status in self.retry_condition]

    @classmethod
    def from_proto(cls, message: rollout_pb2.RolloutConfig) -> Self:
        """Read the stored form."""
        has = message.HasField
        conditions = map(AttemptStatus.from_proto, message.retry_condition)
        return cls(
            timeout_seconds=read_seconds(message, "timeout"),
            unresponsive_seconds=read_seconds(message, "unresponsive"),
            max_attempts=message.max_attempts or 1,
            retry_condition=[condition for condition in conditions if condition],
            max_redeliveries=message.max_redeliveries if has("max_redeliveries") else None,
            retry_backoff_seconds=read_seconds(message, "retry_backoff"),
        )

    def to_proto(self) -> rollout_pb2.RolloutConfig:
        """Write the stored form."""
        return rollout_pb2.RolloutConfig(
            timeout=to_duration(self.timeout_seconds),
            unresponsive=to_duration(self.unresponsive_seconds),
            max_attempts=self.max_attempts,
            retry_condition=[AttemptStatus.parse(status).number for status in self.retry_condition],
            max_redeliveries=self.max_redeliveries,
            retry_backoff=to_duration(self.retry_backoff_seconds),
        )


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One unit of work. Times are seconds since the epoch by the store's clock.

    ``start_time`` is when it was created; ``resources_id`` is ``None`` while unbound.
    """

    rollout_id: str
    input: Any = None
    start_time: float = 0.0
    end_time: float | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    status: RolloutStatus = RolloutStatus.QUEUING
    config: RolloutConfig = field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None
    run_id: str = "default"
    resources_version: int = 0
    group_id: str | None = None
    queue: str = ""
    priority: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    not_before: float | None = None
    expire_after_seconds: float | None = None
    failure: Failure | None = None
    retry_of: str | None = None
    attempt_count: int = 0
    latest_attempt_id: str | None = None
    sealed: bool = False
    binding: ResourceBinding | None = None

    def __post_init__(self) -> None:
        self.status = RolloutStatus.parse(self.status)
        self.mode = None if self.mode is None else RolloutMode.parse(self.mode)
        self.binding = None if self.binding is None else ResourceBinding.parse(self.binding)

    @classmethod
    def from_proto(cls, message: rollout_pb2.Rollout) -> Self:
        """Read the stored form."""
        return cls(**_rollout_fields(message))

    def to_proto(self) -> rollout_pb2.Rollout:
        """Write the stored form."""
        return rollout_pb2.Rollout(
            rollout_id=self.rollout_id,
            run_id=self.run_id,
            input=to_payload(self.input),
            mode=number_of(self.mode),
            status=self.status.number,
            config=self.config.to_proto(),
            resources_id=self.resources_id or "",
            resources_version=self.resources_version,
            group_id=self.group_id or "",
            queue=self.queue,
            priority=self.priority,
            labels=to_labels(self.labels),
            metadata=to_key_values(self.metadata, "metadata"),
            create_time=to_timestamp(self.start_time),
            end_time=to_timestamp(self.end_time),
            not_before=to_timestamp(self.not_before),
            expire_after=to_duration(self.expire_after_seconds),
            failure=self.failure.to_proto() if self.failure else None,
            retry_of=self.retry_of or "",
            attempt_count=self.attempt_count,
            latest_attempt_id=self.latest_attempt_id or "",
            sealed=self.sealed,
            binding=number_of(self.binding),
        )


@dataclass(slots=True, kw_only=True)
class AttemptedRollout(Rollout):
    """A rollout together with one of its attempts.

    ``attempt_credential`` is the agent's secret for this attempt where the store handed one out, else empty.
    """

    attempt: Attempt
    attempt_credential: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        # Zero-argument super() does not find the class that slots=True makes anew.
        Rollout.__post_init__(self)
        if self.attempt.rollout_id != self.rollout_id:
            raise ValueError(
                f"attempt {self.attempt.attempt_id} is of {self.attempt.rollout_id}, not of {self.rollout_id}"
            )

    @classmethod
    def from_messages(
        cls, message: rollout_pb2.AttemptedRollout, attempt_credential: str = ""
    ) -> AttemptedRollout:
        """Read a rollout that has an attempt."""
        return attempted_rollout(message.rollout, message.attempt, attempt_credential)


def attempted_rollout(
    rollout: rollout_pb2.Rollout, attempt: attempt_pb2.Attempt, attempt_credential: str = ""
) -> AttemptedRollout:
    """Join a rollout and one of its attempts."""
    return AttemptedRollout(
        **_rollout_fields(rollout),
        attempt=Attempt.from_proto(attempt),
        attempt_credential=attempt_credential,
    )


def rollout_from_proto(message: rollout_pb2.AttemptedRollout) -> Rollout:
    """Read a rollout: an `AttemptedRollout` when it has an attempt, else a plain `Rollout`."""
    if message.HasField("attempt"):
        return AttemptedRollout.from_messages(message)
    return Rollout.from_proto(message.rollout)


def _rollout_fields(message: rollout_pb2.Rollout) -> dict[str, Any]:
    has = message.HasField
    return {
        "rollout_id": message.rollout_id,
        "input": from_payload(message.input),
        "start_time": from_timestamp(message.create_time),
        "end_time": read_time(message, "end_time"),
        "mode": RolloutMode.from_proto(message.mode),
        "resources_id": message.resources_id or None,
        "status": RolloutStatus.from_proto(message.status) or RolloutStatus.QUEUING,
        "config": RolloutConfig.from_proto(message.config),
        "metadata": from_key_values(message.metadata),
        "run_id": message.run_id,
        "resources_version": message.resources_version,
        "group_id": message.group_id or None,
        "queue": message.queue,
        "priority": message.priority,
        "labels": from_labels(message.labels),
        "not_before": read_time(message, "not_before"),
        "expire_after_seconds": read_seconds(message, "expire_after"),
        "failure": Failure.from_proto(message.failure) if has("failure") else None,
        "retry_of": message.retry_of or None,
        "attempt_count": message.attempt_count,
        "latest_attempt_id": message.latest_attempt_id or None,
        "sealed": message.sealed,
        "binding": ResourceBinding.from_proto(message.binding),
    }


@dataclass(slots=True, kw_only=True)
class EnqueueRolloutRequest:
    """What a caller says of a rollout to be made.

    ``rollout_id`` is minted when ``None``; ``queue`` defaults to the run's own, ``resources_id`` to the
    run's latest publication and ``resources_version`` 0 to its newest version. ``not_before`` is in seconds
    since the epoch.
    """

    input: Any = None
    mode: RolloutMode | str | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    rollout_id: str | None = None
    group_id: str | None = None
    queue: str | None = None
    priority: int = 0
    labels: dict[str, str] | None = None
    not_before: float | None = None
    expire_after_seconds: float | None = None
    binding: ResourceBinding | str | None = None
    resources_version: int = 0

    def to_proto(self) -> rollout_pb2.RolloutSpec:
        """Write the contract's form."""
        return rollout_pb2.RolloutSpec(
            input=to_payload(self.input),
            mode=number_of(RolloutMode.parse(self.mode) if self.mode else None),
            resources_id=self.resources_id or "",
            resources_version=self.resources_version,
            config=self.config.to_proto() if self.config else None,
            metadata=to_key_values(self.metadata, "metadata"),
            rollout_id=self.rollout_id or "",
            group_id=self.group_id or "",
            queue=self.queue or "",
            priority=self.priority,
            labels=to_labels(self.labels),
            not_before=to_timestamp(self.not_before),
            expire_after=to_duration(self.expire_after_seconds),
            binding=number_of(ResourceBinding.parse(self.binding) if self.binding else None),
        )


def plain_rollout(rollout: Rollout) -> Rollout:
    """Leave out the attempt of an `AttemptedRollout`."""
    if not isinstance(rollout, AttemptedRollout):
        return rollout
    return Rollout(**{f.name: getattr(rollout, f.name) for f in fields(Rollout)})
