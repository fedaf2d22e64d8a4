"""A local stand-in for the AgentOps service: its SDK works offline, its spans go to the store."""

from __future__ import annotations

from agl_grpc.agentops.manager import AgentOpsServerManager

__all__ = ["AgentOpsServerManager"]
