"""Policy versions: the weights by which tokens are sampled, and the engines that serve them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from agl_grpc.model.enums import EnginePhase, PolicyVersionStatus
from agl_grpc.model.times import from_timestamp, read_time
from agl_grpc.v1 import policy_pb2


@dataclass(slots=True, kw_only=True)
class WeightSource:
    """How engines get weights: a transfer group at ``rendezvous`` (``host:port``), or files under ``path``.

    ``world_size`` counts the sender at rank 0; ``engine_ids`` are in order of their ranks, from rank 1.
    """

    rendezvous: str = ""
    backend: str = ""
    group_id: str = ""
    world_size: int = 0
    engine_ids: list[str] = field(default_factory=list)
    path: str = ""

    @classmethod
    def from_proto(cls, message: policy_pb2.WeightSource) -> Self:
        """Read the stored form."""
        return cls(
            rendezvous=message.rendezvous,
            backend=message.backend,
            group_id=message.group_id,
            world_size=message.world_size,
            engine_ids=list(message.engine_ids),
            path=message.path,
        )

    def to_proto(self) -> policy_pb2.WeightSource:
        """Write the stored form."""
        return policy_pb2.WeightSource(
            rendezvous=self.rendezvous,
            backend=self.backend,
            group_id=self.group_id,
            world_size=self.world_size,
            engine_ids=self.engine_ids,
            path=self.path,
        )


@dataclass(slots=True, kw_only=True)
class EngineState:
    """What one engine says of one policy version; ``pause_ns`` is how long generation stood still."""

    engine_id: str
    policy_version: int
    phase: EnginePhase
    weights_digest: str = ""
    error: str = ""
    time: float | None = None
    pause_ns: int = 0

    @classmethod
    def from_proto(cls, message: policy_pb2.EngineState) -> Self:
        """Read the stored form."""
        return cls(
            engine_id=message.engine_id,
            policy_version=message.policy_version,
            phase=EnginePhase.from_proto(message.phase) or EnginePhase.RECEIVING,
            weights_digest=message.weights_digest,
            error=message.error,
            time=read_time(message, "time"),
            pause_ns=message.pause_ns,
        )

    def to_proto(self) -> policy_pb2.EngineState:
        """Write the stored form."""
        return policy_pb2.EngineState(
            engine_id=self.engine_id,
            policy_version=self.policy_version,
            phase=self.phase.number,
            weights_digest=self.weights_digest,
            error=self.error,
            pause_ns=self.pause_ns,
        )


@dataclass(slots=True, kw_only=True)
class PolicyVersion:
    """A set of weights: one committed optimiser step. Times are seconds since the epoch."""

    run_id: str
    model: str
    policy_version: int
    status: PolicyVersionStatus
    source: WeightSource
    weights_digest: str = ""
    deadline: float | None = None
    create_time: float = 0.0
    end_time: float | None = None
    engine_states: list[EngineState] = field(default_factory=list)
    abort_reason: str = ""

    @classmethod
    def from_proto(cls, message: policy_pb2.PolicyVersion) -> Self:
        """Read the stored form."""
        return cls(
            run_id=message.run_id,
            model=message.model,
            policy_version=message.policy_version,
            status=PolicyVersionStatus.from_proto(message.status) or PolicyVersionStatus.PREPARING,
            source=WeightSource.from_proto(message.source),
            weights_digest=message.weights_digest,
            deadline=read_time(message, "deadline"),
            create_time=from_timestamp(message.create_time),
            end_time=read_time(message, "end_time"),
            engine_states=[EngineState.from_proto(state) for state in message.engine_states],
            abort_reason=message.abort_reason,
        )


@dataclass(slots=True, kw_only=True)
class Engine:
    """An inference engine that serves a run; ``endpoint`` is the base URL of its HTTP API."""

    engine_id: str
    run_id: str = "default"
    model: str = ""
    endpoint: str = ""
    engine_version: str = ""
    active_policy_version: int = 0
    last_seen_time: float | None = None
    connected: bool = False

    @classmethod
    def from_proto(cls, message: policy_pb2.Engine) -> Self:
        """Read the stored form."""
        return cls(
            engine_id=message.engine_id,
            run_id=message.run_id,
            model=message.model,
            endpoint=message.endpoint,
            engine_version=message.engine_version,
            active_policy_version=message.active_policy_version,
            last_seen_time=read_time(message, "last_seen_time"),
            connected=message.connected,
        )

    def to_proto(self) -> policy_pb2.Engine:
        """Write the form in which an engine makes itself known."""
        return policy_pb2.Engine(
            engine_id=self.engine_id,
            run_id=self.run_id,
            model=self.model,
            endpoint=self.endpoint,
            engine_version=self.engine_version,
            active_policy_version=self.active_policy_version,
        )
