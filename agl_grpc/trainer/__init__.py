"""`Trainer`, the environments it starts engine and learner in, and the processes of a training run."""

from __future__ import annotations

from agl_grpc.trainer.errors import PartDied, TrainerError
from agl_grpc.trainer.options import EngineOptions, RunnerOptions, ValidationOptions
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.strategy import ClientServerExecutionStrategy, SharedMemoryExecutionStrategy
from agl_grpc.trainer.trainer import Trainer
from agl_grpc.trainer.validate import Score, validate

__all__ = [
    "ClientServerExecutionStrategy",
    "EngineOptions",
    "FitResult",
    "PartDied",
    "RunnerOptions",
    "Score",
    "SharedMemoryExecutionStrategy",
    "Trainer",
    "TrainerError",
    "ValidationOptions",
    "validate",
]
