"""The names that users import from the root, and that the root stays quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import agl_grpc

NAMES = {
    "AgentLightningClient",
    "AgentLightningServer",
    "DevTaskLoader",
    "RolloutLegacy",
    "Task",
    "Adapter",
    "LlmProxyTraceToTriplet",
    "OtelTraceAdapter",
    "RewardMatchPolicy",
    "TraceAdapter",
    "TraceToMessages",
    "TracerTraceToTriplet",
    "Triplet",
    "AgentOpsTracer",
    "Algorithm",
    "Attempt",
    "AttemptStatus",
    "AttemptedRollout",
    "EnqueueRolloutRequest",
    "Failure",
    "FailureKind",
    "Hook",
    "LLM",
    "LeaseStream",
    "LitAgent",
    "LitAgentRunner",
    "ModelCall",
    "NamedResources",
    "OtelTracer",
    "PaginatedResult",
    "PromptTemplate",
    "ProxyLLM",
    "Resource",
    "ResourceMissing",
    "ResourcesUpdate",
    "Reward",
    "Rollout",
    "RolloutConfig",
    "RolloutMode",
    "RolloutRawResult",
    "RolloutStatus",
    "Span",
    "SpanCoreFields",
    "SpanGroup",
    "SpanStreamer",
    "StoreClient",
    "StoreError",
    "SyncStoreClient",
    "Trainer",
    "Tracer",
    "TrainerError",
    "VERL",
    "APO",
    "GEPA",
    "Baseline",
    "BestOfN",
    "Worker",
    "WorkerStatus",
    "algo",
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
    "register_resource",
    "rollout",
}


def test_the_exported_names_are_these() -> None:
    assert set(agl_grpc.__all__) == NAMES | {"__version__"}


def test_every_exported_name_can_be_imported() -> None:
    for name in agl_grpc.__all__:
        assert getattr(agl_grpc, name) is not None
    assert set(agl_grpc.__all__) <= set(dir(agl_grpc))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(agl_grpc.__file__).read_text())
    imported = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agl_grpc.")
        for alias in node.names
    }
    assert imported == set(agl_grpc.__all__) - {"__version__"}


def test_importing_the_root_imports_nothing_heavy() -> None:
    code = (
        "import sys, agl_grpc; print([m for m in ('grpc', 'google.protobuf', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
