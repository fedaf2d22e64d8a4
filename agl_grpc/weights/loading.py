"""vLLM's side of a swap, inside each worker process: staged tensors into the running model.

This is the one module of the room that touches vllm, and only inside a vLLM worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.wire import TransferError

if TYPE_CHECKING:
    import torch

Signature = frozenset[tuple[str, tuple[int, ...]]]


def signature(tensors: Iterable[tuple[str, torch.Tensor]]) -> Signature:
    """Names and shapes of a set of tensors: what a model accepted once it accepts again."""
    return frozenset((name, tuple(tensor.shape)) for name, tensor in tensors)


def load_into(model: Any, model_config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load checkpoint tensors into a vLLM model in place, through its layerwise reload.

    Raises TransferError when the tensors do not cover the whole model: half of it would stay old.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    needed = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    loaded = model.load_weights(iter(tensors))
    finalize_layerwise_reload(model, model_config)
    missing = sorted(needed - set(loaded)) if loaded is not None else []
    if missing:
        raise TransferError(f"weights for {len(missing)} parameters were not sent, first {missing[0]}")


def compare_signature(accepted: Signature, offered: Signature) -> None:
    """Raise TransferError naming one difference between two signatures, if any."""
    if accepted == offered:
        return
    name, shape = min(accepted ^ offered)
    verb = "lack" if (name, shape) in accepted else "have an unknown"
    raise TransferError(f"the sent weights {verb} tensor {name} of shape {shape}")
