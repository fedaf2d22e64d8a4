"""agl-grpc: train any AI agent with reinforcement learning, gRPC-first."""

from __future__ import annotations

__version__ = "0.1.0"
