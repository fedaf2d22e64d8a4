"""vLLM's side of a swap, inside each worker process: staged tensors into the running model.

This is the one module of the room that touches vllm, and only inside a vLLM worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.adapters import is_adapter, merged
from agl_grpc.weights.wire import TransferError

if TYPE_CHECKING:
    import torch

Signature = frozenset[tuple[str, tuple[int, ...]]]


def signature(tensors: Iterable[tuple[str, torch.Tensor]]) -> Signature:
    """Names and shapes of a set of tensors: what a model accepted once it accepts again."""
    return frozenset((name, tuple(tensor.shape)) for name, tensor in tensors)


def base_tensors(model: Any, vllm_config: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """The model's tensors on disk, by their names in the checkpoint: what an adapter is added to."""
    from vllm.model_executor.model_loader import get_model_loader

    loader: Any = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):
        raise TransferError(
            f"adapters need the model's own weights on disk, and --load-format "
            f"{vllm_config.load_config.load_format} reads none"
        )
    tensors: Iterable[tuple[str, torch.Tensor]] = loader.get_all_weights(vllm_config.model_config, model)
    return tensors


def load_into(model: Any, vllm_config: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Load checkpoint tensors into a vLLM model in place, through its layerwise reload.

    An adapter is added to the weights on disk. Raises TransferError when the tensors do not cover the
    whole model: half of it would stay old.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if is_adapter(tensors):
        # All of it is made before anything is loaded: an adapter that does not fit changes nothing.
        tensors = list(merged(base_tensors(model, vllm_config), tensors))
    needed = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    loaded = model.load_weights(iter(tensors))
    finalize_layerwise_reload(model, vllm_config.model_config)
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
