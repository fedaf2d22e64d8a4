"""`Trainer`, the environments it starts engine and learner in, and the processes of a training run.

The names are imported when they are first used: the small processes of this room need few of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ imports
    from agl_grpc.trainer.errors import PartDied as PartDied
    from agl_grpc.trainer.errors import TrainerError as TrainerError
    from agl_grpc.trainer.options import EngineOptions as EngineOptions
    from agl_grpc.trainer.options import RunnerOptions as RunnerOptions
    from agl_grpc.trainer.options import ValidationOptions as ValidationOptions
    from agl_grpc.trainer.result import FitResult as FitResult
    from agl_grpc.trainer.strategy import ClientServerExecutionStrategy as ClientServerExecutionStrategy
    from agl_grpc.trainer.strategy import SharedMemoryExecutionStrategy as SharedMemoryExecutionStrategy
    from agl_grpc.trainer.trainer import Trainer as Trainer

_MODULES = {
    "ClientServerExecutionStrategy": "strategy",
    "EngineOptions": "options",
    "FitResult": "result",
    "PartDied": "errors",
    "RunnerOptions": "options",
    "SharedMemoryExecutionStrategy": "strategy",
    "Trainer": "trainer",
    "TrainerError": "errors",
    "ValidationOptions": "options",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'agl_grpc.trainer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"agl_grpc.trainer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
