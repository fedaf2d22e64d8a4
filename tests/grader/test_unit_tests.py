"""The grader whose tests run a response's program in the sandbox."""

from __future__ import annotations

import pytest

from agl_grpc.grader import GraderFailed, Limits, Submission
from agl_grpc.grader.library import UnitTests

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3, 'two'"]


async def test_unit_tests_decide() -> None:
    good, all_of_them = {"tests": TESTS[:2]}, {"tests": TESTS}
    assert (await UnitTests().grade(Submission(input=good, response=ADD))).value == 1.0
    found = await UnitTests().grade(Submission(input=all_of_them, response=ADD))
    assert (found.value, found.notes) == (0.0, {"reason": "AssertionError: two", "passed": 2, "tests": 3})
    part = await UnitTests(partial=True).grade(Submission(input=all_of_them, response=ADD))
    assert part.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("import sys; sys.exit(0)", "the program ended before its tests"),
        ("import os; os._exit(0)", "the program ended before its tests"),
        ("return", "SyntaxError: 'return' outside function"),
        ("while True: pass", "wall_limit: exit code -9"),
        ("x = bytes(10 ** 11)", "memory_limit: MemoryError"),
        ("", "the response holds no program"),
    ],
)
async def test_programs_that_pass_no_test(answer: str, reason: str) -> None:
    limits = Limits(wall_seconds=1.0 if "while" in answer else 60.0)
    found = await UnitTests(limits=limits).grade(Submission(input={"tests": TESTS[0]}, response=answer))
    assert (found.value, found.notes["reason"]) == (0.0, reason)


async def test_tests_that_are_none_are_the_graders_failure() -> None:
    for tests in ([], "", [1], {"a": 1}):
        with pytest.raises(GraderFailed, match="is neither a test nor a list of tests"):
            await UnitTests().grade(Submission(input={"tests": tests}, response=ADD))
