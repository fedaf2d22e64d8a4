"""LoRA adapters as sets of weights: only they travel, and the receiver adds them to the base that it has.

An adapter set holds `lora_A`/`lora_B` pairs by peft's names, one scalar `SCALING`, and whole tensors of
modules that were trained beside them. W' = W + scaling * B @ A (Hu et al. 2021, section 4), in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.wire import TransferError

if TYPE_CHECKING:
    import torch

# Name of the scalar by which every product of an adapter set is multiplied; it marks a set as one.
SCALING = "agl.lora_scaling"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Variants of LoRA whose weights are not base + scaling * B @ A with one scaling.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias")


def is_adapter(tensors: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether a set of tensors is an adapter."""
    return any(name == SCALING for name, _ in tensors)


def adapter_set(
    tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """An adapter's tensors with its scaling.

    Args:
        tensors: peft's state of the adapter, by peft's names.
        config: peft's `LoraConfig` as a mapping.

    Raises:
        TransferError: a variant of LoRA that cannot be sent as an adapter.
    """
    import torch

    for option in _UNSUPPORTED:
        if config.get(option):
            raise TransferError(
                f"adapters with {option} cannot be sent alone: set actor_rollout_ref.model.lora.merge=True"
            )
    rank = int(config["r"])
    scaling = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    yield SCALING, torch.tensor(scaling, dtype=torch.float64)
    yield from tensors


def merged(
    base: Iterable[tuple[str, torch.Tensor]], adapter: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors with the adapter added; one at a time is in memory beside the base.

    Raises:
        TransferError: the adapter belongs to another model.
    """
    given = dict(adapter)
    scaling = float(given.pop(SCALING))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in given.items():
        target = name.removeprefix(_PREFIX)
        for suffix in (_A, _B):
            if target.endswith(suffix):
                parts.setdefault(target.removesuffix(suffix) + ".weight", {})[suffix] = tensor
                break
        else:
            whole[target] = tensor
    for name, tensor in base:
        pair = parts.pop(name, None)
        if pair is not None:
            yield name, _added(name, tensor, pair, scaling)
        else:
            yield name, whole.pop(name, tensor)
    left = sorted([*parts, *whole])
    if left:
        raise TransferError(f"the adapter has {len(left)} modules that the model lacks, first {left[0]}")


def _added(name: str, tensor: torch.Tensor, pair: Mapping[str, torch.Tensor], scaling: float) -> torch.Tensor:
    if set(pair) != {_A, _B}:
        raise TransferError(f"the adapter has one half of {name} only")
    product = pair[_B].float() @ pair[_A].float()
    if product.shape != tensor.shape:
        raise TransferError(
            f"the adapter of {name} makes {tuple(product.shape)}, the model has {tuple(tensor.shape)}"
        )
    return (tensor.float() + scaling * product.to(tensor.device)).to(tensor.dtype)
