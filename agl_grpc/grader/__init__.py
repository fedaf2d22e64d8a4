"""Graders: judges of sealed attempts, run under their own credential."""

from __future__ import annotations

from agl_grpc.grader.base import DEFAULT_RETRIES, DEFAULT_TIMEOUT, FunctionGrader, Grader, grader
from agl_grpc.grader.combined import Graders
from agl_grpc.grader.command import CommandGrader
from agl_grpc.grader.conversation import Message, text_of
from agl_grpc.grader.grade import Grade, GraderFailed, GradeValue, as_grade
from agl_grpc.grader.http import HttpGrader
from agl_grpc.grader.sandbox import Finished, Limits, Sandbox
from agl_grpc.grader.submission import Submission
from agl_grpc.grader.worker import Counts, GraderWorker

__all__ = [
    "DEFAULT_RETRIES",
    "DEFAULT_TIMEOUT",
    "CommandGrader",
    "Counts",
    "Finished",
    "FunctionGrader",
    "Grade",
    "GradeValue",
    "Grader",
    "GraderFailed",
    "GraderWorker",
    "Graders",
    "HttpGrader",
    "Limits",
    "Message",
    "Sandbox",
    "Submission",
    "as_grade",
    "grader",
    "text_of",
]
