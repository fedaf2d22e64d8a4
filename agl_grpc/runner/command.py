"""Isolation `command`: any program is the agent, one process group for each attempt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from agl_grpc.model import FailureKind, NamedResources
from agl_grpc.runner.exits import signal_name
from agl_grpc.runner.load import LoadError
from agl_grpc.runner.outcome import Outcome
from agl_grpc.runner.program import (
    TAIL_BYTES,
    ProgramAgent,
    failed,
    outcome_of,
    resources_bytes,
    task_bytes,
)
from agl_grpc.runner.sweep import WORKER_PID

GRACE_SECONDS = 1.0
"""How long a program may take to end after SIGTERM, before its group is killed."""

_SHELL_NOT_FOUND = 127
_SHELL_NOT_EXECUTABLE = 126


class CommandAgent(ProgramAgent):
    """Runs a shell command for each attempt, in the worker's working directory.

    The task comes on standard input and in the file `AGL_GRPC_TASK_FILE`, resources in
    `AGL_GRPC_RESOURCES_FILE`; model, rollout, attempt and credential are in the environment. Exit code 0 is
    success, with what was written to `AGL_GRPC_REWARD_FILE` as its reward.

    Raises:
        LoadError: the command names a program that is not there.
    """

    def __init__(self, command: str, store: str) -> None:
        super().__init__(store)
        self._command = command
        _check(command)

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Any) -> Any:
        """Runs the command to its end; cancelled, it kills the command's process group."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="agl-grpc-"))
        try:
            environment = self.environment(resources, rollout) | await asyncio.to_thread(
                _write_files, folder, task_bytes(task), resources_bytes(resources)
            )
            code, tail = await self._run(folder, environment)
            rewards = await asyncio.to_thread(_read_if_there, folder / "reward")
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        return _outcome(code, tail, rewards)

    async def _run(self, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        output = _Output()
        try:
            with (folder / "task").open("rb") as task:
                # A session of its own: what the command starts is in its process group.
                process = await asyncio.create_subprocess_shell(
                    self._command,
                    stdin=task,
                    stdout=output.write_end,
                    stderr=output.write_end,
                    env=os.environ | environment | {WORKER_PID: str(os.getpid())},
                    start_new_session=True,
                )
            output.follow()
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await asyncio.shield(_stop(process))
                raise
            finally:
                # What it left running in the background goes with it.
                _signal(process.pid, signal.SIGKILL)
            return code, output.tail()
        finally:
            output.close()


class _Output:
    """The end of what a program writes. A pipe of our own: waiting for the program never waits for it."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._chunks: deque[bytes] = deque()
        self._size = 0

    def follow(self) -> None:
        os.close(self.write_end)
        self.write_end = -1
        asyncio.get_running_loop().add_reader(self._read_end, self._read)

    def _read(self) -> bool:
        try:
            chunk = os.read(self._read_end, 65536)
        except BlockingIOError:
            return False
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._read_end)
            return False
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= TAIL_BYTES:
            self._size -= len(self._chunks.popleft())
        return True

    def tail(self) -> str:
        """What is in the pipe now counts; a process that has escaped its group is not waited for."""
        while self._read():
            pass
        return b"".join(self._chunks)[-TAIL_BYTES:].decode(errors="replace")

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._read_end)
        for end in (self._read_end, self.write_end):
            if end >= 0:
                os.close(end)


async def _stop(process: asyncio.subprocess.Process) -> None:
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_SECONDS):
            await process.wait()
    _signal(process.pid, signal.SIGKILL)
    await process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    # It has ended and left nobody behind, or its group has been given to another user since.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _write_files(folder: Path, task: bytes, resources: bytes) -> dict[str, str]:
    (folder / "task").write_bytes(task)
    (folder / "resources.json").write_bytes(resources)
    return {
        "AGL_GRPC_TASK_FILE": str(folder / "task"),
        "AGL_GRPC_RESOURCES_FILE": str(folder / "resources.json"),
        "AGL_GRPC_REWARD_FILE": str(folder / "reward"),
    }


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _outcome(code: int, tail: str, rewards: bytes) -> Outcome:
    output = {"exit_code": code, "output_tail": tail}
    if code == 0:
        return outcome_of(rewards, output)
    if code < 0:
        name = signal_name(-code)
        # SIGKILL comes from outside, most often from a system that has run out of memory.
        kind = FailureKind.INFRASTRUCTURE if code == -signal.SIGKILL else FailureKind.AGENT
        return failed(name, f"the command was killed by {name}", output, kind)
    # A worker that lacks the program is to blame itself: another one may have it.
    lacking = code in (_SHELL_NOT_FOUND, _SHELL_NOT_EXECUTABLE)
    kind = FailureKind.INFRASTRUCTURE if lacking else FailureKind.AGENT
    return failed(f"exit code {code}", f"the command exited with code {code}", output, kind)


def _check(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise LoadError(f"the command {command!r} cannot be read: {error}") from error
    program = words[0]
    # Only a plain first word can be judged; the shell knows the rest.
    if program.replace("-", "").replace("_", "").replace(".", "").replace("/", "").isalnum() and (
        shutil.which(program) is None and program not in _BUILTINS
    ):
        raise LoadError(f"there is no program {program!r}: install it, or give its path")


_BUILTINS = frozenset(
    {
        "case", "cd", "command", "echo", "eval", "exec", "exit", "export", "for", "if", "printf", "read",
        "set", "source", "test", "trap", "ulimit", "umask", "until", "while",
    }
)  # fmt: skip
