"""Workers that execute rollouts: streaming from the store in processes of their own, or in this one.

The names below are imported when they are first used: a supervisor needs none of what its workers need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_grpc.runner.config import RunnerConfig
    from agl_grpc.runner.failures import AgentFailure
    from agl_grpc.runner.hooks import Hook
    from agl_grpc.runner.lit_agent_runner import LitAgentRunner
    from agl_grpc.runner.load import LoadError
    from agl_grpc.runner.restarts import WorkerStartError
    from agl_grpc.runner.supervisor import Supervisor
    from agl_grpc.runner.worker import Worker

_MODULES = {
    "AgentFailure": "failures",
    "Hook": "hooks",
    "LitAgentRunner": "lit_agent_runner",
    "LoadError": "load",
    "RunnerConfig": "config",
    "Supervisor": "supervisor",
    "Worker": "worker",
    "WorkerStartError": "restarts",
}

__all__ = [
    "AgentFailure",
    "Hook",
    "LitAgentRunner",
    "LoadError",
    "RunnerConfig",
    "Supervisor",
    "Worker",
    "WorkerStartError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
