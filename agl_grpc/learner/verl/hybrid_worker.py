"""What vLLM's workers are extended by where verl starts vLLM: verl's methods and ours."""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from agl_grpc.weights.extension import WeightSwapExtension

HYBRID_EXTENSION = f"{__name__}.HybridWorkerExtension"
"""Qualified name for vLLM's ``worker_extension_cls``."""


class HybridWorkerExtension(WeightSwapExtension, vLLMColocateWorkerExtension):  # type: ignore[misc]  # verl is untyped
    """verl prepares the model through its half; weights come through ours."""
