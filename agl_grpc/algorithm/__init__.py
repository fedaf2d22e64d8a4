"""Algorithms: what `Trainer.fit` runs over a dataset. Nothing heavy is imported here."""

from __future__ import annotations

from agl_grpc.algorithm.base import Algorithm, FunctionalAlgorithm, algo
from agl_grpc.algorithm.verl import VERL

__all__ = ["VERL", "Algorithm", "FunctionalAlgorithm", "algo"]
