"""Evaluation: how good a model is on a dataset, how surely, and whether another one is better."""

from __future__ import annotations

from agl_grpc.evaluation.answers import find_answer, normalise
from agl_grpc.evaluation.comparison import Comparison, compare
from agl_grpc.evaluation.errors import EvaluationError
from agl_grpc.evaluation.report import write_report
from agl_grpc.evaluation.result import Answered, Evaluation, Figures, TaskResult, describe
from agl_grpc.evaluation.run import Pass, evaluate, publish_sampling
from agl_grpc.evaluation.sampling import Sampling, with_sampling
from agl_grpc.evaluation.statistics import (
    Interval,
    PairedTest,
    bootstrap,
    majority,
    paired_test,
    pass_at_k,
)

__all__ = [
    "Answered",
    "Comparison",
    "Evaluation",
    "EvaluationError",
    "Figures",
    "Interval",
    "PairedTest",
    "Pass",
    "Sampling",
    "TaskResult",
    "bootstrap",
    "compare",
    "describe",
    "evaluate",
    "find_answer",
    "majority",
    "normalise",
    "paired_test",
    "pass_at_k",
    "publish_sampling",
    "with_sampling",
    "write_report",
]
