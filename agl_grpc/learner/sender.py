"""verl checkpoint engine ``agl``: the trainer's ranks as senders of weights. (Transport: see weights room.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry


@CheckpointEngineRegistry.register("agl")
class WeightSender(CheckpointEngine):  # type: ignore[misc]  # verl is untyped
    def __init__(self, bucket_size: int, is_master: bool = False, **_: Any) -> None:
        self._is_master = is_master

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(cls, *args: Any) -> Any:
        return {}, {}

    def init_process_group(self, **kwargs: Any) -> None:
        return None

    def finalize(self) -> None:
        return None

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> Any:
        count = 0
        for _name, tensor in weights:
            count += tensor.numel()
        return {"sent": count}

    async def receive_weights(self, global_steps: int | None = None) -> Any:
        raise RuntimeError("engines receive weights through their own receiver")
