"""The grader of Python programs: unit tests decide."""

from __future__ import annotations

import secrets
from typing import Any

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade
from agl_grpc.grader.library.answers import bad_reference, find_answer, look_up, right, shown, wrong
from agl_grpc.grader.sandbox import Finished, Limits, Sandbox
from agl_grpc.grader.submission import Submission

# The word is read last: an answer that ends the program early, or prints, passes no test.
_HARNESS = """\
import sys
space = {"__name__": "answer"}
with open("answer.py") as file:
    exec(compile(file.read(), "answer.py", "exec"), space)
with open("tests.py") as file:
    exec(compile(file.read(), "tests.py", "exec"), space)
print("\\n" + sys.stdin.readline().strip())
"""


class UnitTests(Grader):
    """The response's Python program passes the task's tests, in a sandbox.

    The program is the response's last fenced block, else the whole response. Each test is Python code, run
    after the program in the same name space, and passes when it raises nothing. A program that does not end,
    or takes more than it may, has failed its tests. What an answer prints counts for nothing; one made to
    deceive its own process could still pretend, as with every test that runs beside the code it tests.

    Args:
        reference: Where the task holds the tests: a text, or a list of them.
        partial: Whether the value is the share of tests that pass; else it is 1.0 only when all do.
        limits: What one test may take.
        python: The interpreter within the sandbox.
    """

    def __init__(
        self,
        *,
        name: str = "unit_tests",
        reference: str = "tests",
        partial: bool = False,
        limits: Limits | None = None,
        python: str = "python3",
        version: str = "1",
        timeout: float = 120.0,
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=0, isolated=False)
        self.reference = reference
        self.partial = partial
        self.python = python
        self.sandbox = Sandbox(limits=limits or Limits())

    async def open(self) -> None:
        """Tries the sandbox."""
        await self.sandbox.check()

    async def grade(self, submission: Submission) -> Grade:
        """All tests, one after another; notes hold what the first that failed said."""
        tests = _tests(look_up(submission.input, self.reference))
        answer = find_answer(submission.response, "fence") or submission.response.strip()
        if not answer:
            return wrong("the response holds no program", passed=0, tests=len(tests))
        reasons = [await self._run(answer, test) for test in tests]
        passed = reasons.count("")
        if passed == len(tests):
            return right(passed=passed, tests=len(tests))
        first = next(reason for reason in reasons if reason)
        grade = wrong(first, passed=passed, tests=len(tests))
        return Grade(value=passed / len(tests), notes=grade.notes) if self.partial else grade

    async def _run(self, answer: str, test: str) -> str:
        """Why a test does not pass; empty = it does."""
        word = secrets.token_hex(16)
        files = {"answer.py": answer, "tests.py": test, "harness.py": _HARNESS}
        done = await self.sandbox.run(
            [self.python, "-I", "-B", "harness.py"],
            word.encode() + b"\n",
            {name: text.encode(errors="replace") for name, text in files.items()},
        )
        if done.outcome != "ok":
            return _why(done)
        if done.stdout.decode(errors="replace").strip().endswith(word):
            return ""
        return "the program ended before its tests"


def _why(done: Finished) -> str:
    """Why a program did not pass: what stopped it, and the last line that it wrote."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = shown(lines[-1]) if lines else f"exit code {done.code}"
    return said if done.outcome == "exit_code" else f"{done.outcome}: {said}"


def _tests(found: Any) -> list[str]:
    tests = [found] if isinstance(found, str) else found
    if (
        not isinstance(tests, list)
        or not tests
        or not all(isinstance(one, str) and one.strip() for one in tests)
    ):
        raise bad_reference("is neither a test nor a list of tests")
    return list(tests)
