"""Runs, the scope of everything, and groups of rollouts that are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from agl_grpc.model.times import from_timestamp, read_seconds, to_duration
from agl_grpc.model.value import from_key_values, to_key_values
from agl_grpc.v1 import run_pb2


@dataclass(frozen=True, slots=True)
class RunGrader:
    """A grader whose verdicts a run waits for.

    name: the grader's, or ``NAME/COMPONENT`` for a component that counts by itself. version: the one that is
    waited for; empty = any. weight: how much the reward counts; 0 = it is recorded only.
    """

    name: str
    version: str = ""
    weight: float = 1.0


@dataclass(slots=True, kw_only=True)
class Run:
    """A run. ``None`` keeps finished rollouts for ever (``retention_seconds``), pins for ever what committed
    batches name (``replay_retention_seconds``), and means 60 s (``seal_timeout_seconds``) or 600 s
    (``grading_timeout_seconds``: how long a succeeded rollout waits for the verdicts of ``graders``).
    """

    run_id: str
    create_time: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    allow_self_grading: bool = False
    retention_seconds: float | None = None
    paused: bool = False
    paused_queues: list[str] = field(default_factory=list)
    seal_timeout_seconds: float | None = None
    replay_retention_seconds: float | None = None
    graders: list[RunGrader] = field(default_factory=list)
    grading_timeout_seconds: float | None = None

    @property
    def reward_weights(self) -> dict[str, float]:
        """What counts of the graders' rewards, by name; empty = the run names no graders."""
        return {grader.name: grader.weight for grader in self.graders if grader.weight}

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Self:
        """Read the stored form."""
        return cls(
            run_id=message.run_id,
            create_time=from_timestamp(message.create_time),
            metadata=from_key_values(message.metadata),
            allow_self_grading=message.allow_self_grading,
            retention_seconds=read_seconds(message, "retention"),
            paused=message.paused,
            paused_queues=list(message.paused_queues),
            seal_timeout_seconds=read_seconds(message, "seal_timeout"),
            replay_retention_seconds=read_seconds(message, "replay_retention"),
            graders=[
                RunGrader(one.name, one.version, one.weight if one.HasField("weight") else 1.0)
                for one in message.graders
            ],
            grading_timeout_seconds=read_seconds(message, "grading_timeout"),
        )

    def to_proto(self) -> run_pb2.Run:
        """Write the form in which a run is made or changed."""
        return run_pb2.Run(
            run_id=self.run_id,
            metadata=to_key_values(self.metadata, "metadata"),
            allow_self_grading=self.allow_self_grading,
            retention=to_duration(self.retention_seconds),
            seal_timeout=to_duration(self.seal_timeout_seconds),
            replay_retention=to_duration(self.replay_retention_seconds),
            graders=graders_to_proto(self.graders),
            grading_timeout=to_duration(self.grading_timeout_seconds),
        )


def graders_to_proto(graders: Iterable[RunGrader]) -> list[run_pb2.RunGrader]:
    """Write the stored form of graders."""
    return [run_pb2.RunGrader(name=one.name, version=one.version, weight=one.weight) for one in graders]


@dataclass(slots=True, kw_only=True)
class Group:
    """How far a group of rollouts has come: how many there are, are finished, are finished and sealed."""

    run_id: str
    group_id: str
    total: int
    terminal: int
    sealed: int
    rollout_ids: list[str] = field(default_factory=list)

    @classmethod
    def from_proto(cls, message: run_pb2.Group) -> Self:
        """Read the stored form."""
        return cls(
            run_id=message.run_id,
            group_id=message.group_id,
            total=message.total,
            terminal=message.terminal,
            sealed=message.sealed,
            rollout_ids=list(message.rollout_ids),
        )
