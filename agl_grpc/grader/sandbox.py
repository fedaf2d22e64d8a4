"""Programs under limits: bubblewrap's namespaces, resource limits, and a watch over the whole.

A program sees the system's own programs and libraries and this Python, all read-only, an empty `/box` and
`/tmp` of its own, and nothing else of the machine: no home, no network, no other process, no variable.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from agl_grpc.grader.grade import GraderFailed

_LOOK_SECONDS = 0.02
_SPARE_PROCESSES = 8
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/ssl/certs")
_SIGNALS = {
    signal.SIGXCPU: "cpu_limit",
    signal.SIGXFSZ: "file_limit",
}
_OUT_OF_MEMORY = (b"MemoryError", b"Cannot allocate memory", b"std::bad_alloc", b"out of memory")
# Each sandbox that root starts has a user of its own, so that processes are counted for it alone.
_USERS = itertools.cycle(range(1 << 30, (1 << 30) + (1 << 20)))
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may take.

    Attributes:
        cpu_seconds: Processor time of each process.
        memory_bytes: Memory of all processes together, the files in `/box` and `/tmp` apart.
        processes: Processes and threads at once.
        output_bytes: Of each of stdout and stderr.
        file_bytes: Size of one file, and of all in `/box`, and of all in `/tmp`.
    """

    cpu_seconds: int = 10
    memory_bytes: int = 512 * _MIB
    processes: int = 32
    output_bytes: int = _MIB
    file_bytes: int = 64 * _MIB

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "memory_bytes", "processes", "output_bytes", "file_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended.

    Attributes:
        outcome: `exited`; `signalled`; or what stopped it: `timeout`, `cpu_limit`, `memory_limit`,
            `process_limit`, `output_limit`, `file_limit`.
        code: Its exit code; 128 and more = a signal.
        stdout: What it wrote, up to the limit.
        stderr: The same.
    """

    outcome: str
    code: int
    stdout: bytes
    stderr: bytes

    @property
    def tail(self) -> str:
        """The last line that it wrote to stderr, for people."""
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


class Sandbox:
    """Runs programs with bubblewrap.

    Args:
        limits: What each may take.
        readable: Files and folders that it may read, at their own paths.
        network: Whether it has the machine's network; else it has none.
        environment: Variables that it gets; it has `PATH`, `HOME` and `LANG` besides.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        readable: Sequence[str | Path] = (),
        network: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.readable = tuple(str(Path(one).absolute()) for one in readable)
        self.network = network
        self.environment = dict(environment or {})

    async def check(self) -> None:
        """Runs a program that does nothing.

        Raises:
            GraderFailed: bubblewrap is not there, or this machine does not let it work.
        """
        if missing := self._missing():
            raise GraderFailed(f"what the sandbox shall read is not there: {', '.join(missing)}", final=True)
        await self.run(["true"], seconds=30)

    def _missing(self) -> list[str]:
        return [one for one in self.readable if not Path(one).exists()]

    async def run(
        self,
        command: Sequence[str],
        *,
        seconds: float,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
    ) -> Ended:
        """Runs one program in `/box`.

        Args:
            command: Program and arguments.
            seconds: When it is stopped.
            stdin: What it is given.
            files: What stands in `/box`, by relative path; it cannot change these.

        Raises:
            GraderFailed: the sandbox itself cannot work (outcome `sandbox`).
        """
        with contextlib.ExitStack() as stack:
            given = {name: stack.enter_context(_pipe(data)) for name, data in (files or {}).items()}
            arguments = [*self._outside(given), *self._inside(), *command]
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=list(given.values()),
                env={},
                cwd="/",
                start_new_session=True,
            )
            try:
                ended = await _Run(process, self.limits).end(stdin, seconds)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if ended.outcome == "exited" and ended.code and ended.stderr.startswith((b"bwrap:", b"setpriv:")):
            raise _unusable(f"does not work here: {ended.tail}")
        return ended

    def _outside(self, files: Mapping[str, int]) -> list[str]:
        """bubblewrap and its options."""
        size = str(self.limits.file_bytes)
        command = [_bubblewrap(), "--die-with-parent", "--new-session", "--clearenv"]
        command += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += [] if self.network else ["--unshare-net"]
        if os.geteuid() == 0:
            # Rights to become another user, which is done next: root's own are not limited by the kernel.
            command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            command += ["--cap-add", "CAP_SETPCAP"]
        else:
            command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        command += ["--ro-bind", "/usr", "/usr"]
        for place in _SYSTEM:
            if os.path.islink(place):
                command += ["--symlink", os.readlink(place), place]
            elif os.path.isdir(place):
                command += ["--ro-bind", place, place]
        command += ["--dev", "/dev", "--proc", "/proc"]
        for place in ("/tmp", "/box"):
            command += ["--perms", "1777", "--size", size, "--tmpfs", place]
        # What is bound below them comes after these.
        for place in (*_ETC, sys.base_prefix, sys.prefix, *self.readable):
            if not place.startswith("/usr/"):
                # bubblewrap makes folders in between for their owner only.
                for folder in reversed(Path(place).parents[:-1]):
                    command += ["--perms", "0755", "--dir", str(folder)]
                command += ["--ro-bind-try", place, place]
        if self.network:
            command += ["--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"]
        for name, descriptor in files.items():
            command += ["--perms", "0444", "--ro-bind-data", str(descriptor), f"/box/{name}"]
        variables = {
            "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/box",
            "LANG": "C.UTF-8",
            **self.environment,
        }
        for name, value in variables.items():
            command += ["--setenv", name, value]
        return [*command, "--chdir", "/box", "--"]

    def _inside(self) -> list[str]:
        """What lowers the program's rights and sets its limits, within the namespaces."""
        limits = self.limits
        lowered: list[str] = []
        if os.geteuid() == 0:
            user = str(next(_USERS))
            lowered = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            lowered += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
        return [
            *lowered,
            "prlimit",
            f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
            # Address space is more than memory; the watch sees to the memory.
            f"--as={4 * limits.memory_bytes + 1024 * _MIB}",
            f"--nproc={limits.processes + _SPARE_PROCESSES}",
            f"--fsize={limits.file_bytes}",
            "--core=0",
            "--nofile=256",
            "--",
        ]


class _Run:
    """One program under way."""

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self._stopped = ""

    async def end(self, stdin: bytes, seconds: float) -> Ended:
        """Waits for its end, or brings it about."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        watch = asyncio.create_task(self._watch())
        end = asyncio.get_running_loop().call_later(seconds, self._stop, "timeout")
        try:
            _, stdout, stderr = await asyncio.gather(
                _feed(process.stdin, stdin), self._read(process.stdout), self._read(process.stderr)
            )
            code = await process.wait()
        finally:
            end.cancel()
            watch.cancel()
        return Ended(self._stopped or _outcome(code, stderr), code, stdout, stderr)

    def _stop(self, outcome: str) -> None:
        # The end of bubblewrap is the end of its namespace of processes: none is left.
        self._stopped = self._stopped or outcome
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _read(self, stream: asyncio.StreamReader) -> bytes:
        found = bytearray()
        while part := await stream.read(1 << 16):
            found += part
            if len(found) > self._limits.output_bytes:
                self._stop("output_limit")
                del found[self._limits.output_bytes :]
        return bytes(found)

    async def _watch(self) -> None:
        """Looks at all processes together, which no limit of the kernel's does without a control group."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                processes = psutil.Process(self._process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                return
            threads = memory = 0
            for one in processes:
                with contextlib.suppress(psutil.Error):
                    threads += one.num_threads()
                    memory += one.memory_info().rss
            if threads > self._limits.processes:
                self._stop("process_limit")
            elif memory > self._limits.memory_bytes:
                self._stop("memory_limit")


async def _feed(writer: asyncio.StreamWriter, data: bytes) -> None:
    # A program need not read what it is given.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        writer.write(data)
        await writer.drain()
    writer.close()


def _outcome(code: int, stderr: bytes) -> str:
    number = -code if code < 0 else code - 128
    if number in _SIGNALS:
        return _SIGNALS[signal.Signals(number)]
    if code and any(words in stderr for words in _OUT_OF_MEMORY):
        return "memory_limit"
    return "signalled" if number > 0 else "exited"


@contextlib.contextmanager
def _pipe(data: bytes) -> Iterator[int]:
    """A descriptor from which data can be read."""
    descriptor = os.memfd_create("sandbox")
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _bubblewrap() -> str:
    named = os.environ.get("AGL_GRPC_BWRAP", "")
    found = shutil.which(named or "bwrap")
    if found is None:
        raise _unusable(f"is not there ({named})" if named else "is not installed")
    return found


def _unusable(why: str) -> GraderFailed:
    return GraderFailed(
        f"the sandbox's program bwrap {why}; install bubblewrap (apt-get install bubblewrap) and allow "
        'namespaces of users, or say sandbox="none" to run commands without one',
        outcome="sandbox",
        final=True,
    )
