"""Graders in any language: a command that reads a submission and writes a grade."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade, GraderFailed, as_grade
from agl_grpc.grader.sandbox import Ended, Limits, Sandbox
from agl_grpc.grader.submission import Submission


class CommandGrader(Grader):
    """Runs a command for each submission, in a sandbox.

    The command reads the submission as one JSON object from stdin (`Submission.to_dict`), and its last line
    of stdout is the grade: a number, `true`, `false`, or an object with `value` and, as it likes,
    `components` and `notes`. An exit code other than 0, a limit that was met, or a line that is no grade is
    a failure of the grader.

    Args:
        command: Program and arguments; a text is split as a shell would, and run without one.
        limits: What it may take; `timeout` is its wall-clock time.
        readable: Files and folders that it may read; the program's own among them.
        network: Whether it has the machine's network.
        environment: Variables that it gets.
        sandbox: `bubblewrap`, or `none` to run a command that is trusted without any limit but the time-out.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        name: str,
        version: str = "1",
        timeout: float = 60.0,
        retries: int = 0,
        limits: Limits | None = None,
        readable: Sequence[str | Path] = (),
        network: bool = False,
        environment: Mapping[str, str] | None = None,
        sandbox: Literal["bubblewrap", "none"] = "bubblewrap",
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=retries, isolated=False)
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise ValueError(f"grader {name} has no command")
        if sandbox not in ("bubblewrap", "none"):
            raise ValueError(f"sandbox of grader {name} is {sandbox!r}; it is 'bubblewrap' or 'none'")
        self.environment = dict(environment or {})
        self.sandbox = (
            Sandbox(limits, readable=readable, network=network, environment=environment)
            if sandbox == "bubblewrap"
            else None
        )

    async def open(self) -> None:
        """Tries the sandbox."""
        if self.sandbox is not None:
            await self.sandbox.check()

    async def grade(self, submission: Submission) -> Grade:
        """What the command says."""
        asked = json.dumps(submission.to_dict(), default=str).encode() + b"\n"
        if self.sandbox is None:
            ended = await self._run_alone(asked)
        else:
            ended = await self.sandbox.run(self.command, seconds=self.timeout, stdin=asked)
        if ended.outcome != "exited" or ended.code:
            raise failed(ended)
        return _read(ended.stdout)

    async def _run_alone(self, asked: bytes) -> Ended:
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **self.environment},
            )
        except OSError as error:
            raise GraderFailed(f"{self.command[0]} cannot be run: {error}", outcome="command") from None
        try:
            async with asyncio.timeout(self.timeout):
                stdout, stderr = await process.communicate(asked)
        except TimeoutError:
            return Ended("timeout", -9, b"", b"")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return Ended("exited" if process.returncode >= 0 else "signalled", process.returncode, stdout, stderr)


def failed(ended: Ended) -> GraderFailed:
    """The failure that an end stands for."""
    tail = f": {ended.tail}" if ended.tail else ""
    if ended.outcome == "exited":
        return GraderFailed(
            f"the command exited with code {ended.code}{tail}",
            outcome="command",
            detail=ended.stderr.decode(errors="replace")[-4000:],
        )
    what = {
        "timeout": "did not end in time",
        "signalled": f"was ended by signal {abs(ended.code) & 127}",
        "cpu_limit": "took more processor time than it may",
        "memory_limit": "took more memory than it may",
        "process_limit": "started more processes than it may",
        "output_limit": "wrote more output than it may",
        "file_limit": "wrote a larger file than it may",
    }[ended.outcome]
    return GraderFailed(f"the command {what}{tail}", outcome=ended.outcome)


def _read(stdout: bytes) -> Grade:
    lines = stdout.decode(errors="replace").strip().splitlines()
    if not lines:
        raise GraderFailed("the command wrote no grade to stdout", outcome="not_a_grade", final=True)
    try:
        said: Any = json.loads(lines[-1])
    except ValueError:
        raise GraderFailed(
            f"the command's last line is no grade in JSON: {lines[-1][:200]!r}",
            outcome="not_a_grade",
            final=True,
        ) from None
    if isinstance(said, dict) and ("components" in said or "notes" in said):
        parts, notes = said.get("components") or {}, said.get("notes") or {}
        if "value" not in said or not isinstance(parts, dict) or not isinstance(notes, dict):
            raise GraderFailed(
                "the command's grade lacks a value, or its components or notes are no objects",
                outcome="not_a_grade",
                final=True,
            )
        return as_grade(Grade(value=said["value"], components=parts, notes=notes))
    return as_grade(said)
