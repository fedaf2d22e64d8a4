"""Ready-made graders; those in small letters have the defaults: `--grader agl_grpc.grader.library:maths`."""

from __future__ import annotations

from agl_grpc.grader.library.answers import AnswerGrader, find_answer
from agl_grpc.grader.library.code import UnitTests
from agl_grpc.grader.library.numbers import Maths, Numeric
from agl_grpc.grader.library.schema import JsonSchema
from agl_grpc.grader.library.sql import SqlMatch
from agl_grpc.grader.library.texts import ExactMatch, RegularExpression

exact_match = ExactMatch()
numeric = Numeric()
maths = Maths()
json_schema = JsonSchema()
regular_expression = RegularExpression()
sql_match = SqlMatch()
unit_tests = UnitTests()

__all__ = [
    "AnswerGrader",
    "ExactMatch",
    "JsonSchema",
    "Maths",
    "Numeric",
    "RegularExpression",
    "SqlMatch",
    "UnitTests",
    "exact_match",
    "find_answer",
    "json_schema",
    "maths",
    "numeric",
    "regular_expression",
    "sql_match",
    "unit_tests",
]
