"""A judgement of an attempt, of one of its spans, or of one of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from agl_grpc.model.failure import Failure
from agl_grpc.model.times import read_time, to_timestamp
from agl_grpc.model.value import from_key_values, to_key_values
from agl_grpc.v1 import reward_pb2

PRIMARY = "primary"
NAME_BYTES = 128


class RewardKey(NamedTuple):
    """Which reward of an attempt: its name, and the step (from 0) or the span (hex id) that it judges."""

    name: str = PRIMARY
    step: int | None = None
    target_span_id: str | None = None

    @property
    def judges_attempt(self) -> bool:
        """Whether it judges the whole attempt."""
        return self.step is None and self.target_span_id is None


@dataclass(slots=True, kw_only=True)
class Reward:
    """A finite number given to an attempt, to a span of it (``target_span_id``, in hex) or a step (from 0).

    ``value`` is ``None`` exactly when ``failure`` says why the grader gave none: there is no such reward.

    Of several with the same name, target, step and grader the largest ``revision`` counts; 0 = one more than
    the last. ``grader`` ``None`` means the agent itself.
    """

    rollout_id: str
    attempt_id: str
    value: float | None = None
    name: str = PRIMARY
    target_span_id: str | None = None
    step: int | None = None
    grader: str | None = None
    revision: int = 0
    create_time: float | None = None
    metadata: dict[str, Any] | None = None
    failure: Failure | None = None
    grader_version: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.failure is not None):
            raise ValueError(f"reward {self.name!r} must have either a value or the grader's failure")
        if self.value is None:
            return
        self.value = float(self.value)
        if not math.isfinite(self.value):
            raise ValueError(f"reward {self.name!r} is {self.value}; it must be finite")

    @classmethod
    def from_proto(cls, message: reward_pb2.Reward) -> Self:
        """Read the stored form."""
        return cls(
            rollout_id=message.rollout_id,
            attempt_id=message.attempt_id,
            value=message.value if message.HasField("value") else None,
            name=message.name or PRIMARY,
            target_span_id=message.target_span_id.hex() or None,
            step=message.step if message.HasField("step") else None,
            grader=message.grader or None,
            revision=message.revision,
            create_time=read_time(message, "create_time"),
            metadata=from_key_values(message.metadata),
            failure=Failure.from_proto(message.failure) if message.HasField("failure") else None,
            grader_version=message.grader_version or None,
        )

    def to_proto(self) -> reward_pb2.Reward:
        """Write the stored form."""
        return reward_pb2.Reward(
            rollout_id=self.rollout_id,
            attempt_id=self.attempt_id,
            name=self.name,
            value=self.value,
            target_span_id=bytes.fromhex(self.target_span_id or ""),
            step=self.step,
            grader=self.grader or "",
            revision=self.revision,
            create_time=to_timestamp(self.create_time),
            metadata=to_key_values(self.metadata, "metadata"),
            failure=self.failure.to_proto() if self.failure else None,
            grader_version=self.grader_version or "",
        )
