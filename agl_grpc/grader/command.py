"""Graders that are commands: the submission on standard input, the grade on standard output."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import orjson

from agl_grpc.grader.base import DEFAULT_RETRIES, Grader
from agl_grpc.grader.grade import Grade, GraderFailed, as_grade
from agl_grpc.grader.sandbox import Finished, Limits, Sandbox
from agl_grpc.grader.submission import Submission

_TOLD = 300


class CommandGrader(Grader):
    """Runs a command in a sandbox for each submission.

    It gets one JSON object (`Submission.to_dict`) on standard input and answers on standard output with a
    JSON number, boolean, object of named components, or `{"value": …, "components": {…}, "notes": {…}}`.

    Args:
        command: The program and its arguments; a text is split as a shell would.
        name: See `Grader`, as `version` and `retries`.
        sandbox: Where it runs; `Sandbox("none")` without walls. Its `limits.wall_seconds` is the time-out.

    Raises:
        ValueError: an empty command.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        name: str = "command",
        version: str = "1",
        retries: int = DEFAULT_RETRIES,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise ValueError("the command is empty; name a program")
        self.sandbox = sandbox or Sandbox(limits=Limits())
        # The sandbox keeps the time; the worker's own is only the net below it.
        seconds = self.sandbox.limits.wall_seconds + 30.0
        super().__init__(name=name, version=version, timeout=seconds, retries=retries)

    async def open(self) -> None:
        """Tries the sandbox; raises `GraderFailed` with what to do when it cannot be used."""
        await self.sandbox.check()

    async def grade(self, submission: Submission) -> Grade:
        """The grade that the command prints; raises `GraderFailed` with the sandbox's outcome."""
        told = orjson.dumps(submission.to_dict(), default=str, option=orjson.OPT_NON_STR_KEYS)
        done = await self.sandbox.run(self.command, told)
        if done.outcome != "ok":
            raise GraderFailed(
                f"the command ended with {done.outcome}, exit code {done.code}: {_last_line(done)}",
                outcome=done.outcome,
                detail=done.stderr.decode(errors="replace"),
            )
        return read_grade(done.stdout)


def read_grade(data: bytes) -> Grade:
    """The grade in a command's or a server's JSON; raises `GraderFailed` with outcome `not_a_grade`."""
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        shown = data[:80].decode(errors="replace")
        raise GraderFailed(f"the answer is no JSON: {shown!r}", outcome="not_a_grade") from None
    if isinstance(answer, dict) and ("components" in answer or "notes" in answer):
        parts, notes = answer.get("components") or {}, answer.get("notes") or {}
        if not isinstance(parts, dict) or not isinstance(notes, dict):
            raise GraderFailed("components and notes must be objects", outcome="not_a_grade")
        return as_grade(Grade(value=answer.get("value", 0.0), components=parts, notes=notes))
    return as_grade(answer)


def _last_line(done: Finished) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:_TOLD] if lines else "it said nothing"
