"""Training runs, batches that are trained exactly once, and their metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from agl_grpc.model.enums import BatchStatus, TrainingRunStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.reward import Reward
from agl_grpc.model.times import from_timestamp, read_time
from agl_grpc.model.value import from_key_values, from_payload, to_key_values, to_payload
from agl_grpc.v1 import batch_pb2, training_pb2


@dataclass(slots=True, kw_only=True)
class TrainingRun:
    """An execution of an algorithm over a run. ``training_run_id`` empty = the store mints one.

    ``result`` is what came of it, for example the best prompts; None until its end.
    """

    training_run_id: str = ""
    run_id: str = "default"
    algorithm: str = ""
    config: Any = None
    status: TrainingRunStatus = TrainingRunStatus.PENDING
    trainer_epoch: int = 0
    step: int = 0
    checkpoint_id: str | None = None
    create_time: float = 0.0
    end_time: float | None = None
    failure: Failure | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    trainer_id: str | None = None
    result: Any = None

    @classmethod
    def from_proto(cls, message: training_pb2.TrainingRun) -> Self:
        """Read the stored form."""
        return cls(
            training_run_id=message.training_run_id,
            run_id=message.run_id,
            algorithm=message.algorithm,
            config=from_payload(message.config),
            status=TrainingRunStatus.from_proto(message.status) or TrainingRunStatus.PENDING,
            trainer_epoch=message.trainer_epoch,
            step=message.step,
            checkpoint_id=message.checkpoint_id or None,
            create_time=from_timestamp(message.create_time),
            end_time=read_time(message, "end_time"),
            failure=Failure.from_proto(message.failure) if message.HasField("failure") else None,
            metadata=from_key_values(message.metadata),
            trainer_id=message.trainer_id or None,
            result=from_payload(message.result) if message.HasField("result") else None,
        )

    def to_proto(self) -> training_pb2.TrainingRun:
        """Write the form in which a training run is made."""
        return training_pb2.TrainingRun(
            training_run_id=self.training_run_id,
            run_id=self.run_id,
            algorithm=self.algorithm,
            config=None if self.config is None else to_payload(self.config, "config"),
            metadata=to_key_values(self.metadata, "metadata"),
        )


@dataclass(slots=True, kw_only=True)
class StepMetrics:
    """All numbers of one step (0 = before training), by name."""

    step: int
    metrics: dict[str, float]
    time: float | None = None
    trainer_epoch: int = 0

    @classmethod
    def from_proto(cls, message: training_pb2.StepMetrics) -> Self:
        """Read the stored form."""
        return cls(
            step=message.step,
            metrics={metric.name: metric.value for metric in message.metrics},
            time=read_time(message, "time"),
            trainer_epoch=message.trainer_epoch,
        )

    def to_proto(self) -> training_pb2.StepMetrics:
        """Write the stored form."""
        metrics = [training_pb2.Metric(name=name, value=value) for name, value in self.metrics.items()]
        return training_pb2.StepMetrics(step=self.step, metrics=metrics)


@dataclass(slots=True, frozen=True, kw_only=True)
class LogLine:
    """A line that a trainer wrote for people; ``time`` is seconds since the epoch."""

    number: int
    text: str
    time: float | None = None
    trainer_epoch: int = 0

    @classmethod
    def from_proto(cls, message: training_pb2.LogLine) -> Self:
        """Read the stored form."""
        return cls(
            number=message.number,
            text=message.text,
            time=read_time(message, "time"),
            trainer_epoch=message.trainer_epoch,
        )


@dataclass(slots=True, kw_only=True)
class ManifestEntry:
    """One attempt of a batch, frozen; ``reward`` ``None`` = none; ``span_ids`` are its model calls in hex.

    ``rewards`` are all of the attempt's; empty where ``reward`` is the only one.
    """

    rollout_id: str
    attempt_id: str
    group_id: str | None = None
    reward: float | None = None
    reward_revision: int = 0
    span_ids: list[str] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)

    @classmethod
    def from_proto(cls, message: batch_pb2.ManifestEntry) -> Self:
        """Read the stored form."""
        return cls(
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            group_id=message.group_id or None,
            reward=message.reward if message.HasField("reward") else None,
            reward_revision=message.reward_revision,
            span_ids=[span_id.hex() for span_id in message.span_ids],
            rewards=[Reward.from_proto(reward) for reward in message.rewards],
        )


@dataclass(slots=True, kw_only=True)
class Batch:
    """A batch: content-hashed, never changed once made, replayable."""

    batch_id: str
    training_run_id: str
    run_id: str
    status: BatchStatus
    content_hash: str
    entries: list[ManifestEntry]
    trainer_epoch: int
    step: int
    checkpoint_id: str | None = None
    create_time: float = 0.0
    commit_time: float | None = None

    @classmethod
    def from_proto(cls, message: batch_pb2.Batch) -> Self:
        """Read the stored form."""
        return cls(
            batch_id=message.batch_id,
            training_run_id=message.training_run_id,
            run_id=message.run_id,
            status=BatchStatus.from_proto(message.status) or BatchStatus.CLAIMED,
            content_hash=message.content_hash,
            entries=[ManifestEntry.from_proto(entry) for entry in message.entries],
            trainer_epoch=message.trainer_epoch,
            step=message.step,
            checkpoint_id=message.checkpoint_id or None,
            create_time=from_timestamp(message.create_time),
            commit_time=read_time(message, "commit_time"),
        )
