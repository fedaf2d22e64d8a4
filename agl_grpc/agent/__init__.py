"""What agents are written with: base class, decorators, emitters and their readers."""

from __future__ import annotations

from agl_grpc.agent.context import Recorder, current_recorder
from agl_grpc.agent.decorators import FunctionalLitAgent, llm_rollout, prompt_rollout, rollout
from agl_grpc.agent.emit import emit_annotation, emit_exception, emit_message, emit_object, emit_reward
from agl_grpc.agent.lit_agent import LitAgent, Purpose, RolloutRawResult
from agl_grpc.agent.missing import PublishedResources, ResourceMissing
from agl_grpc.agent.operation import OperationContext, operation
from agl_grpc.model.reading import (
    NamedReward,
    find_final_reward,
    find_message_spans,
    find_object_spans,
    find_reward_spans,
    get_message_value,
    get_object_value,
    get_reward_step,
    get_reward_target,
    get_reward_value,
    get_rewards_from_span,
    is_reward_span,
)

__all__ = [
    "FunctionalLitAgent",
    "LitAgent",
    "NamedReward",
    "OperationContext",
    "PublishedResources",
    "Purpose",
    "Recorder",
    "ResourceMissing",
    "RolloutRawResult",
    "current_recorder",
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
    "get_reward_step",
    "get_reward_target",
    "get_reward_value",
    "get_rewards_from_span",
    "is_reward_span",
    "llm_rollout",
    "operation",
    "prompt_rollout",
    "rollout",
]
