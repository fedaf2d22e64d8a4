"""Workers that execute rollouts: streaming from the store in processes of their own, or in this one."""

from __future__ import annotations

from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.failures import AgentFailure
from agl_grpc.runner.hooks import Hook
from agl_grpc.runner.lit_agent_runner import LitAgentRunner
from agl_grpc.runner.load import LoadError
from agl_grpc.runner.supervisor import Supervisor, WorkerStartError
from agl_grpc.runner.worker import Worker

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
