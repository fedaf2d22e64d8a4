"""Algorithms: what `Trainer.fit` runs over a dataset. Nothing heavy is imported here."""

from __future__ import annotations

from agl_grpc.algorithm.apo import APO
from agl_grpc.algorithm.base import Algorithm, FunctionalAlgorithm, algo
from agl_grpc.algorithm.baseline import Baseline, FastAlgorithm
from agl_grpc.algorithm.best_of_n import BestOfN
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.algorithm.gepa import GEPA
from agl_grpc.algorithm.reporting import Reporter
from agl_grpc.algorithm.verl import VERL
from agl_grpc.client.rollout_batch import cancel_rest, primary_rewards, run_rollouts

__all__ = [
    "APO",
    "GEPA",
    "VERL",
    "Algorithm",
    "AlgorithmError",
    "Baseline",
    "BestOfN",
    "FastAlgorithm",
    "FunctionalAlgorithm",
    "Reporter",
    "algo",
    "cancel_rest",
    "primary_rewards",
    "run_rollouts",
]
