"""Graders that ask a model: by a rubric, or by comparison."""

from __future__ import annotations

from agl_grpc.grader.judge.asking import Judge
from agl_grpc.grader.judge.pairwise import PairwiseJudge
from agl_grpc.grader.judge.rubric import Criterion, RubricJudge

__all__ = ["Criterion", "Judge", "PairwiseJudge", "RubricJudge"]
