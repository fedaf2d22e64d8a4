"""The public Python types and their conversion to and from the contract."""

from __future__ import annotations

from agl_grpc.model.attempt import Attempt, Lease
from agl_grpc.model.enums import (
    AttemptStatus,
    BatchStatus,
    CommandKind,
    Durability,
    EnginePhase,
    EntityKind,
    FailureKind,
    FilterLogic,
    LogprobSemantics,
    ModelCallOutcome,
    PolicyVersionStatus,
    ResourceBinding,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    SpanKind,
    StatusCode,
    TrainingRunStatus,
    WaitUntil,
    WorkerStatus,
)
from agl_grpc.model.failure import Failure
from agl_grpc.model.model_call import Choice, ModelCall, PolicyRun
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.policy import Engine, EngineState, PolicyVersion, WeightSource
from agl_grpc.model.resource import (
    LLM,
    NamedResources,
    PromptTemplate,
    ProxyLLM,
    Resource,
    ResourcesUpdate,
    UnknownResource,
    register_resource,
)
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import AttemptedRollout, EnqueueRolloutRequest, Rollout, RolloutConfig
from agl_grpc.model.run import Group, Run, RunGrader
from agl_grpc.model.span import Event, Link, Span, SpanCoreFields, TraceStatus
from agl_grpc.model.training import Batch, LogLine, ManifestEntry, StepMetrics, TrainingRun
from agl_grpc.model.value import BlobReference, RawPayload
from agl_grpc.model.worker import LeaseInfo, Worker, WorkerCommand

__all__ = [
    "LLM",
    "Attempt",
    "AttemptStatus",
    "AttemptedRollout",
    "Batch",
    "BatchStatus",
    "BlobReference",
    "Choice",
    "CommandKind",
    "Durability",
    "Engine",
    "EnginePhase",
    "EngineState",
    "EnqueueRolloutRequest",
    "EntityKind",
    "Event",
    "Failure",
    "FailureKind",
    "FilterLogic",
    "Group",
    "Lease",
    "LeaseInfo",
    "Link",
    "LogLine",
    "LogprobSemantics",
    "ManifestEntry",
    "ModelCall",
    "ModelCallOutcome",
    "NamedResources",
    "PaginatedResult",
    "PolicyRun",
    "PolicyVersion",
    "PolicyVersionStatus",
    "PromptTemplate",
    "ProxyLLM",
    "RawPayload",
    "Resource",
    "ResourceBinding",
    "ResourcesUpdate",
    "Reward",
    "Rollout",
    "RolloutConfig",
    "RolloutMode",
    "RolloutStatus",
    "Run",
    "RunGrader",
    "SortOrder",
    "Span",
    "SpanCoreFields",
    "SpanKind",
    "StatusCode",
    "StepMetrics",
    "TraceStatus",
    "TrainingRun",
    "TrainingRunStatus",
    "UnknownResource",
    "WaitUntil",
    "WeightSource",
    "Worker",
    "WorkerCommand",
    "WorkerStatus",
    "register_resource",
]
