"""States and kinds, under the lower-case names that users type.

Each class stands for one enum of the contract. Numbers that this version does not know read as
``None``, never as an error, so that a newer store can be read.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Any, Self

from agl_grpc.v1 import (
    attempt_pb2,
    batch_pb2,
    common_pb2,
    event_pb2,
    model_call_pb2,
    policy_pb2,
    rollout_pb2,
    span_pb2,
    store_service_pb2,
    training_pb2,
    worker_pb2,
)


class ContractEnum(StrEnum):
    """A string that is also one value of an enum of the contract."""

    @property
    def number(self) -> Any:  # the stubs give every enum an int type of its own
        """The value's number in the contract."""
        return _numbers(type(self))[self.value]

    @classmethod
    def from_proto(cls, number: int) -> Self | None:
        """Read a number of the contract; ``None`` when it is unspecified or unknown here."""
        name = _names(cls).get(number)
        return None if name is None else cls(name)

    @classmethod
    def parse(cls, value: str) -> Self:
        """Read a name, in any case; raise `ValueError` that lists the allowed names."""
        try:
            return cls(value.lower())
        except ValueError:
            allowed = ", ".join(member.value for member in cls)
            raise ValueError(f"{value!r} is not a {cls.__name__}; allowed: {allowed}") from None


def number_of(value: ContractEnum | None) -> Any:
    """The number of a value, 0 (unspecified) for ``None``."""
    return 0 if value is None else value.number


class RolloutStatus(ContractEnum):
    """Where a rollout stands; succeeded, failed and cancelled are final."""

    QUEUING = "queuing"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REQUEUING = "requeuing"

    @property
    def is_terminal(self) -> bool:
        """Whether the rollout will never change again."""
        return self in (RolloutStatus.SUCCEEDED, RolloutStatus.FAILED, RolloutStatus.CANCELLED)


class AttemptStatus(ContractEnum):
    """Where an attempt stands."""

    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNRESPONSIVE = "unresponsive"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the attempt has ended."""
        return self not in (AttemptStatus.PREPARING, AttemptStatus.RUNNING)


class RolloutMode(ContractEnum):
    """What a rollout is for; only ``train`` is trained."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class ResourceBinding(ContractEnum):
    """When a rollout is bound to a version of its run's resources."""

    AT_ENQUEUE = "at_enqueue"
    AT_LEASE = "at_lease"


class FailureKind(ContractEnum):
    """Who or what is to blame for a failure."""

    INFRASTRUCTURE = "infrastructure"
    AGENT = "agent"
    ENVIRONMENT = "environment"
    GRADER = "grader"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"


class WorkerStatus(ContractEnum):
    """What a worker is doing."""

    IDLE = "idle"
    BUSY = "busy"
    UNKNOWN = "unknown"
    DRAINING = "draining"


class CommandKind(ContractEnum):
    """What a worker is told to do."""

    CANCEL = "cancel"
    DRAIN = "drain"
    RESOURCES = "resources"


class WaitUntil(ContractEnum):
    """What a wait waits for."""

    TERMINAL = "terminal"
    SEALED = "sealed"


class SortOrder(ContractEnum):
    """Direction of a sorted list; accepts ``asc`` and ``desc`` too."""

    ASCENDING = "ascending"
    DESCENDING = "descending"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        short = {"asc": "ascending", "desc": "descending"}.get(str(value))
        return None if short is None else cls(short)


class FilterLogic(ContractEnum):
    """How several conditions combine."""

    AND = "and"
    OR = "or"


class Durability(ContractEnum):
    """What an acknowledgement guarantees."""

    MEMORY = "memory"
    DISK = "disk"


class SpanKind(ContractEnum):
    """What role a span plays in a trace."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class StatusCode(ContractEnum):
    """Outcome of the work that a span stands for; absent = not stated."""

    OK = "ok"
    ERROR = "error"


class LogprobSemantics(ContractEnum):
    """Which distribution the recorded logprobs belong to."""

    RAW = "raw"
    PROCESSED = "processed"


class ModelCallOutcome(ContractEnum):
    """How a model call ended."""

    COMPLETE = "complete"
    CUT = "cut"
    ERROR = "error"


class TrainingRunStatus(ContractEnum):
    """Where a training run stands."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_terminal(self) -> bool:
        """Whether the training run has ended."""
        return self in (TrainingRunStatus.SUCCEEDED, TrainingRunStatus.FAILED, TrainingRunStatus.STOPPED)


class BatchStatus(ContractEnum):
    """Where a batch stands."""

    CLAIMED = "claimed"
    COMMITTED = "committed"
    RELEASED = "released"


class PolicyVersionStatus(ContractEnum):
    """Where a policy version stands."""

    PREPARING = "preparing"
    COMMITTED = "committed"
    ABORTED = "aborted"


class EnginePhase(ContractEnum):
    """Where an engine stands with a policy version."""

    RECEIVING = "receiving"
    RECEIVED = "received"
    ACTIVE = "active"
    FAILED = "failed"


class EntityKind(ContractEnum):
    """What an event of the log is about."""

    ROLLOUT = "rollout"
    ATTEMPT = "attempt"
    RESOURCES = "resources"
    SPANS = "spans"
    REWARD = "reward"
    RUN = "run"
    TRAINING_RUN = "training_run"
    POLICY_VERSION = "policy_version"
    BATCH = "batch"
    ENGINE = "engine"


# Every wrapper has a type of its own in the stubs, hence Any.
_CONTRACT: dict[type[ContractEnum], Any] = {
    RolloutStatus: rollout_pb2.RolloutStatus,
    AttemptStatus: attempt_pb2.AttemptStatus,
    RolloutMode: rollout_pb2.RolloutMode,
    ResourceBinding: rollout_pb2.ResourceBinding,
    FailureKind: attempt_pb2.FailureKind,
    WorkerStatus: worker_pb2.WorkerStatus,
    CommandKind: worker_pb2.CommandKind,
    WaitUntil: store_service_pb2.WaitUntil,
    SortOrder: common_pb2.SortOrder,
    FilterLogic: common_pb2.FilterLogic,
    Durability: common_pb2.Durability,
    SpanKind: span_pb2.SpanKind,
    StatusCode: span_pb2.SpanStatusCode,
    LogprobSemantics: model_call_pb2.LogprobSemantics,
    ModelCallOutcome: model_call_pb2.ModelCallOutcome,
    TrainingRunStatus: training_pb2.TrainingRunStatus,
    BatchStatus: batch_pb2.BatchStatus,
    PolicyVersionStatus: policy_pb2.PolicyVersionStatus,
    EnginePhase: policy_pb2.EnginePhase,
    EntityKind: event_pb2.EntityKind,
}


@cache
def _numbers(kind: type[ContractEnum]) -> dict[str, int]:
    wrapper = _CONTRACT[kind]
    unspecified = wrapper.Name(0)
    prefix = unspecified.removesuffix("UNSPECIFIED")
    return {name.removeprefix(prefix).lower(): number for name, number in wrapper.items() if number}


@cache
def _names(kind: type[ContractEnum]) -> dict[int, str]:
    return {number: name for name, number in _numbers(kind).items()}
