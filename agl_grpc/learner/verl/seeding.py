"""Seeds what verl leaves to chance: parameters that begin at random, of adapters and of a critic's head.

verl seeds its FSDP workers in its fully deterministic mode alone, which is slow. Without a seed a trainer
that begins again before its first checkpoint comes by other weights than those that sampled what it claimed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import ray
import torch
from verl.single_controller.ray import RayWorkerGroup


def seed_process(seed: int) -> None:
    """Seeds this process's generators, of accelerators too; every rank draws the same numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seeded_workers(seed: int, *args: Any, **kwargs: Any) -> RayWorkerGroup:
    """verl's worker group, each of whose processes is seeded before it builds a model."""
    group = RayWorkerGroup(*args, **kwargs)
    ray.get([worker.__ray_call__.remote(_seed_worker, seed) for worker in group.workers])
    return group


def _seed_worker(_worker: Any, seed: int) -> None:
    seed_process(seed)
