"""GEPA: prompts evolve by reflection, kept as a Pareto front over tasks."""

from __future__ import annotations

from agl_grpc.algorithm.gepa.gepa import GEPA

__all__ = ["GEPA"]
