"""What vLLM's workers are extended by where verl starts vLLM: verl's methods and ours."""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from agl_grpc.weights.extension import WeightSwapExtension

HYBRID_EXTENSION = f"{__name__}.HybridWorkerExtension"
"""Qualified name for vLLM's ``worker_extension_cls``."""


class HybridWorkerExtension(WeightSwapExtension, vLLMColocateWorkerExtension):  # type: ignore[misc]  # verl is untyped
    """verl prepares the model through its half; weights come through ours."""

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        """As verl's, but without keeping engines from ids above the tokenizer's.

        The trainer's softmax has them too, and what engines leave out is then missing from their logprobs.
        """
        whole = self.model_runner.vllm_config.model_config.get_vocab_size()
        super().monkey_patch_model(max(vocab_size, whole), banned_token_ids)
