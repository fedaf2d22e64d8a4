"""Commands in a sandbox: bubblewrap for walls, rlimits and a watch over the whole family for limits.

Inside there is no network, the machine's files can be read and not written, `/tmp` is private and gone
afterwards, the environment is empty. CPU time, memory and file size are limited for each process, memory
and the number of processes also for all together; wall time and output are limited from outside. A supervisor
that is root gives each sandbox a user id of its own: root is not bound by the limit of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agl_grpc.grader.grade import GraderFailed

BWRAP_VARIABLE = "AGL_GRPC_BWRAP"
"""Environment variable that names the bwrap program, where it is not on the PATH."""

_LOOK_SECONDS = 0.2
_FIRST_UID = 1_900_000
_uids = itertools.cycle(range(_FIRST_UID, _FIRST_UID + 50_000))
_MISSING = (
    "there is no bwrap for the sandbox: install bubblewrap (apt-get install bubblewrap), name it in "
    f"{BWRAP_VARIABLE}, or choose sandbox='none' if you trust the command"
)
_SAID = (
    (re.compile(rb"MemoryError|[Cc]annot allocate memory|bad_alloc|out of memory", re.I), "memory_limit"),
    (
        re.compile(rb"Resource temporarily unavailable|can't start new thread|BlockingIOError"),
        "process_limit",
    ),
    (re.compile(rb"Network is unreachable|name resolution|Connection refused|ENETUNREACH"), "no_network"),
    (re.compile(rb"Read-only file system|EROFS"), "read_only"),
    (re.compile(rb"File too large|No space left"), "file_limit"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may use.

    wall_seconds: from start to end. cpu_seconds: of each process. memory_mib: address space of each process,
    and resident memory of all together. processes: at once, threads too. output_kib: of standard output, and
    of standard error. file_mib: of one file, and of all in `/tmp`.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mib: int = 512
    processes: int = 32
    output_kib: int = 256
    file_mib: int = 16

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 < value < 1 << 31:
                raise ValueError(f"sandbox limit {name} is {value}; it must be positive")


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended.

    outcome: `ok` (exit code 0), `exit_code`, or what stopped it: `wall_limit`, `cpu_limit`, `memory_limit`,
    `process_limit`, `output_limit`, `file_limit`, `no_network`, `read_only`, `killed`. The last four and the
    limits that a command meets by itself are told by what it says on standard error.
    """

    outcome: str
    code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Runs commands. `kind` `none` runs them without walls, with the same limits of time and size.

    readable: folders and files from below `/tmp` that commands may read, at the same place.

    Raises:
        ValueError: another kind.
    """

    kind: Literal["bwrap", "none"] = "bwrap"
    limits: Limits = field(default_factory=Limits)
    readable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("bwrap", "none"):
            raise ValueError(f"sandbox {self.kind!r} is neither 'bwrap' nor 'none'")

    async def check(self) -> None:
        """Tries the sandbox out.

        Raises:
            GraderFailed: there is no bwrap, or the system refuses it; the message says what to do.
        """
        done = await self.run(["true"])
        if done.outcome != "ok":
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise GraderFailed(
                f"the sandbox does not work here: {' '.join(said)} (unprivileged user namespaces may be "
                "switched off: sysctl kernel.unprivileged_userns_clone=1; sandbox='none' does without)",
                outcome="sandbox",
                final=True,
            )

    async def run(
        self, command: Sequence[str], stdin: bytes = b"", files: Mapping[str, bytes] | None = None
    ) -> Finished:
        """Runs a command in `/tmp/work`, where `files` lie; it never outlives the call.

        Raises:
            GraderFailed: there is no bwrap; outcome `sandbox`.
            ValueError: a file's name that is no plain name, or files without walls.
        """
        with contextlib.ExitStack() as stack:
            call, options = self._call(command, files or {}, stack)
            process = await asyncio.create_subprocess_exec(
                *call,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                **options,
            )
        return await _Watched(process, self.limits).finish(stdin)

    def _call(
        self, command: Sequence[str], files: Mapping[str, bytes], stack: contextlib.ExitStack
    ) -> tuple[list[str], dict[str, Any]]:
        limited = [*_prlimit(self.limits), *command]
        if self.kind == "none":
            if files:
                raise ValueError("files need a sandbox: without one there is no place for them")
            return limited, {}
        size = str(self.limits.file_mib << 20)
        walls = [_bwrap(), "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
        walls += ["--proc", "/proc", "--size", size, "--tmpfs", "/tmp", "--tmpfs", "/run"]
        walls += [word for path in self.readable for word in ("--ro-bind", path, path)]
        walls += ["--dir", WORK, "--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin"]
        walls += ["--setenv", "HOME", WORK, "--setenv", "LANG", "C.UTF-8", "--chdir", WORK]
        descriptors = []
        for name, content in files.items():
            if not name or "/" in name or name in (".", ".."):
                raise ValueError(f"file name {name!r} must be a plain name")
            number = os.memfd_create(name)
            stack.callback(os.close, number)
            os.write(number, content)
            os.lseek(number, 0, os.SEEK_SET)
            descriptors.append(number)
            walls += ["--perms", "0644", "--file", str(number), f"{WORK}/{name}"]
        options: dict[str, Any] = {"pass_fds": descriptors}
        if os.geteuid() == 0:
            uid = next(_uids)
            options |= {"user": uid, "group": uid, "extra_groups": []}
        return [*walls, "--", *limited], options


WORK = "/tmp/work"
"""Where commands start, and where their files lie."""


def _bwrap() -> str:
    found = os.environ.get(BWRAP_VARIABLE) or shutil.which("bwrap")
    if not found or not Path(found).exists():
        raise GraderFailed(_MISSING, outcome="sandbox", final=True)
    return found


def _prlimit(limits: Limits) -> list[str]:
    memory, size = limits.memory_mib << 20, limits.file_mib << 20
    return [
        *("prlimit", f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}", f"--as={memory}:{memory}"),
        *(f"--nproc={limits.processes}:{limits.processes}", f"--fsize={size}:{size}", "--core=0:0", "--"),
    ]


class _Watched:
    """A command under way."""

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self._stopped = ""

    async def finish(self, stdin: bytes) -> Finished:
        process = self._process
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            reads = asyncio.gather(
                self._read(process.stdout), self._read(process.stderr), self._write(stdin), process.wait()
            )
            looks = asyncio.create_task(self._look())
            try:
                async with asyncio.timeout(self._limits.wall_seconds):
                    stdout, stderr, _, code = await asyncio.shield(reads)
            except TimeoutError:
                self._stop("wall_limit")
                stdout, stderr, _, code = await reads
            finally:
                looks.cancel()
        finally:
            self._stop("")
        return Finished(self._outcome(code, stderr), code, stdout, stderr)

    async def _read(self, stream: asyncio.StreamReader) -> bytes:
        most = self._limits.output_kib << 10
        kept = bytearray()
        while part := await stream.read(1 << 16):
            kept += part[: most - len(kept)]
            if len(part) > 0 and len(kept) >= most and not self._stopped:
                self._stop("output_limit")
        return bytes(kept)

    async def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # not everyone reads it
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        self._process.stdin.close()

    async def _look(self) -> None:
        """Ends a family that is too large together, whatever each of its processes may have."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            count, resident = _family(self._process.pid)
            if resident > self._limits.memory_mib << 20:
                self._stop("memory_limit")
            elif count > self._limits.processes + 4:
                self._stop("process_limit")

    def _stop(self, why: str) -> None:
        self._stopped = self._stopped or why
        # Its first process is the sandbox's own init: all others die with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _outcome(self, code: int, stderr: bytes) -> str:
        if self._stopped:
            return self._stopped
        if code == 0:
            return "ok"
        number = -code if code < 0 else code - 128  # bwrap reports a signal as 128 + its number
        if number in (signal.SIGXCPU, signal.SIGXFSZ):
            return "cpu_limit" if number == signal.SIGXCPU else "file_limit"
        for pattern, outcome in _SAID:
            if pattern.search(stderr):
                return outcome
        return "killed" if number == signal.SIGKILL else "exit_code"


def _family(pid: int) -> tuple[int, int]:
    """How many processes descend from one, itself counted, and their resident bytes."""
    waiting, count, pages = [pid], 0, 0
    while waiting:
        one = waiting.pop()
        try:
            with open(f"/proc/{one}/statm", "rb") as statm:
                pages += int(statm.read().split()[1])
            count += 1
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children", "rb") as children:
                    waiting += map(int, children.read().split())
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return count, pages * os.sysconf("SC_PAGE_SIZE")
