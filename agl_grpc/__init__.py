"""agl-grpc: train any AI agent with reinforcement learning, gRPC-first.

The names below are imported when they are first used, so that ``import agl_grpc`` is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Before gRPC is imported: its own fork handlers crash children that agents fork while a call is under way.
# Ours is never used in a forked child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_ROOMS: dict[str, tuple[str, ...]] = {
    "agl_grpc.agent": (
        "LitAgent",
        "ResourceMissing",
        "RolloutRawResult",
        "emit_annotation",
        "emit_exception",
        "emit_message",
        "emit_object",
        "emit_reward",
        "find_final_reward",
        "find_message_spans",
        "find_object_spans",
        "find_reward_spans",
        "get_message_value",
        "get_object_value",
        "get_reward_value",
        "get_rewards_from_span",
        "is_reward_span",
        "llm_rollout",
        "operation",
        "prompt_rollout",
        "rollout",
    ),
    "agl_grpc.algorithm": ("APO", "GEPA", "VERL", "Algorithm", "Baseline", "BestOfN", "algo"),
    "agl_grpc.client": (
        "LeaseStream",
        "SpanGroup",
        "SpanStreamer",
        "StoreClient",
        "StoreError",
        "SyncStoreClient",
    ),
    "agl_grpc.model": (
        "LLM",
        "Attempt",
        "AttemptStatus",
        "AttemptedRollout",
        "EnqueueRolloutRequest",
        "Failure",
        "FailureKind",
        "ModelCall",
        "NamedResources",
        "PaginatedResult",
        "PromptTemplate",
        "ProxyLLM",
        "Resource",
        "ResourcesUpdate",
        "Reward",
        "Rollout",
        "RolloutConfig",
        "RolloutMode",
        "RolloutStatus",
        "Span",
        "SpanCoreFields",
        "Worker",
        "WorkerStatus",
        "register_resource",
    ),
    "agl_grpc.runner": ("Hook", "LitAgentRunner"),
    "agl_grpc.sample.adapter": (
        "Adapter",
        "LlmProxyTraceToTriplet",
        "OtelTraceAdapter",
        "RewardMatchPolicy",
        "TraceAdapter",
        "TraceToMessages",
        "TracerTraceToTriplet",
        "Triplet",
    ),
    "agl_grpc.tracer": ("AgentOpsTracer", "OtelTracer", "Tracer"),
    "agl_grpc.trainer.legacy": (
        "AgentLightningClient",
        "AgentLightningServer",
        "DevTaskLoader",
        "RolloutLegacy",
        "Task",
    ),
    "agl_grpc.trainer": ("Trainer", "TrainerError"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_ROOM_OF)]

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ imports
    from agl_grpc.agent import LitAgent as LitAgent
    from agl_grpc.agent import ResourceMissing as ResourceMissing
    from agl_grpc.agent import RolloutRawResult as RolloutRawResult
    from agl_grpc.agent import emit_annotation as emit_annotation
    from agl_grpc.agent import emit_exception as emit_exception
    from agl_grpc.agent import emit_message as emit_message
    from agl_grpc.agent import emit_object as emit_object
    from agl_grpc.agent import emit_reward as emit_reward
    from agl_grpc.agent import find_final_reward as find_final_reward
    from agl_grpc.agent import find_message_spans as find_message_spans
    from agl_grpc.agent import find_object_spans as find_object_spans
    from agl_grpc.agent import find_reward_spans as find_reward_spans
    from agl_grpc.agent import get_message_value as get_message_value
    from agl_grpc.agent import get_object_value as get_object_value
    from agl_grpc.agent import get_reward_value as get_reward_value
    from agl_grpc.agent import get_rewards_from_span as get_rewards_from_span
    from agl_grpc.agent import is_reward_span as is_reward_span
    from agl_grpc.agent import llm_rollout as llm_rollout
    from agl_grpc.agent import operation as operation
    from agl_grpc.agent import prompt_rollout as prompt_rollout
    from agl_grpc.agent import rollout as rollout
    from agl_grpc.algorithm import APO as APO
    from agl_grpc.algorithm import GEPA as GEPA
    from agl_grpc.algorithm import VERL as VERL
    from agl_grpc.algorithm import Algorithm as Algorithm
    from agl_grpc.algorithm import Baseline as Baseline
    from agl_grpc.algorithm import BestOfN as BestOfN
    from agl_grpc.algorithm import algo as algo
    from agl_grpc.client import LeaseStream as LeaseStream
    from agl_grpc.client import SpanGroup as SpanGroup
    from agl_grpc.client import SpanStreamer as SpanStreamer
    from agl_grpc.client import StoreClient as StoreClient
    from agl_grpc.client import StoreError as StoreError
    from agl_grpc.client import SyncStoreClient as SyncStoreClient
    from agl_grpc.model import LLM as LLM
    from agl_grpc.model import Attempt as Attempt
    from agl_grpc.model import AttemptedRollout as AttemptedRollout
    from agl_grpc.model import AttemptStatus as AttemptStatus
    from agl_grpc.model import EnqueueRolloutRequest as EnqueueRolloutRequest
    from agl_grpc.model import Failure as Failure
    from agl_grpc.model import FailureKind as FailureKind
    from agl_grpc.model import ModelCall as ModelCall
    from agl_grpc.model import NamedResources as NamedResources
    from agl_grpc.model import PaginatedResult as PaginatedResult
    from agl_grpc.model import PromptTemplate as PromptTemplate
    from agl_grpc.model import ProxyLLM as ProxyLLM
    from agl_grpc.model import Resource as Resource
    from agl_grpc.model import ResourcesUpdate as ResourcesUpdate
    from agl_grpc.model import Reward as Reward
    from agl_grpc.model import Rollout as Rollout
    from agl_grpc.model import RolloutConfig as RolloutConfig
    from agl_grpc.model import RolloutMode as RolloutMode
    from agl_grpc.model import RolloutStatus as RolloutStatus
    from agl_grpc.model import Span as Span
    from agl_grpc.model import SpanCoreFields as SpanCoreFields
    from agl_grpc.model import Worker as Worker
    from agl_grpc.model import WorkerStatus as WorkerStatus
    from agl_grpc.model import register_resource as register_resource
    from agl_grpc.runner import Hook as Hook
    from agl_grpc.runner import LitAgentRunner as LitAgentRunner
    from agl_grpc.sample.adapter import Adapter as Adapter
    from agl_grpc.sample.adapter import LlmProxyTraceToTriplet as LlmProxyTraceToTriplet
    from agl_grpc.sample.adapter import OtelTraceAdapter as OtelTraceAdapter
    from agl_grpc.sample.adapter import RewardMatchPolicy as RewardMatchPolicy
    from agl_grpc.sample.adapter import TraceAdapter as TraceAdapter
    from agl_grpc.sample.adapter import TracerTraceToTriplet as TracerTraceToTriplet
    from agl_grpc.sample.adapter import TraceToMessages as TraceToMessages
    from agl_grpc.sample.adapter import Triplet as Triplet
    from agl_grpc.tracer import AgentOpsTracer as AgentOpsTracer
    from agl_grpc.tracer import OtelTracer as OtelTracer
    from agl_grpc.tracer import Tracer as Tracer
    from agl_grpc.trainer import Trainer as Trainer
    from agl_grpc.trainer import TrainerError as TrainerError
    from agl_grpc.trainer.legacy import AgentLightningClient as AgentLightningClient
    from agl_grpc.trainer.legacy import AgentLightningServer as AgentLightningServer
    from agl_grpc.trainer.legacy import DevTaskLoader as DevTaskLoader
    from agl_grpc.trainer.legacy import RolloutLegacy as RolloutLegacy
    from agl_grpc.trainer.legacy import Task as Task


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'agl_grpc' has no attribute {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF})
