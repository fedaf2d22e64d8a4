"""Processes that the trainer starts: each in a session of its own, with a log file, ended by its id."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agl_grpc.runner.exits import describe_exit
from agl_grpc.runner.parent import signal_when_parent_dies
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.sweep import MARK

TAIL_LINES = 15
_ERROR = "error: "
_spawning = threading.Lock()


class Part:
    """A process with a name for people, a log and an exit code; `on_exit` is called once, from a thread."""

    def __init__(self, name: str, log: Path, mark: str) -> None:
        self.name = name
        self.log = log
        self.mark = mark
        self.started = 0.0
        self._ended = threading.Event()
        self._code: int | None = None
        self._stopping = False

    def start(self, on_exit: Callable[[Part], None]) -> None:
        """Starts the process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        try:
            self._launch()
        except BaseException:
            self._ended.set()  # there is nothing to end
            raise
        threading.Thread(target=self._watch, args=(on_exit,), name=f"watch-{self.name}", daemon=True).start()

    def _launch(self) -> None:
        raise TypeError("Part is a base class")

    def _join(self) -> int:
        raise TypeError("Part is a base class")

    @property
    def pid(self) -> int:
        """The process id."""
        raise TypeError("Part is a base class")

    def _watch(self, on_exit: Callable[[Part], None]) -> None:
        self._code = self._join()
        self._ended.set()
        on_exit(self)

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._code

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stopping

    def terminate(self) -> None:
        """Asks it to end (SIGTERM)."""
        self._stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and its group at once (SIGKILL)."""
        self._stopping = True
        self._signal(signal.SIGKILL, group=True)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, within so many seconds."""
        return self._ended.wait(seconds)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def obituary(self) -> str:
        """How it ended, the error that it named, where its log lies, and the log's last lines."""
        said = self.tail()
        errors = [line for line in said.splitlines() if line.startswith(_ERROR)]
        reason = f": {errors[-1].removeprefix(_ERROR).strip()}" if errors else ""
        shown = "\n".join(f"  | {line}" for line in said.splitlines()) or "  | (it wrote nothing)"
        return f"{self.name} {describe_exit(self.code)}{reason}; its log is {self.log}, which ends:\n{shown}"

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if self._ended.is_set():
            return
        try:
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # It has just ended, or has not made its own session yet: the sweep finds it.


class Command(Part):
    """A command line."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, mark: str, environment: Mapping[str, str]
    ) -> None:
        super().__init__(name, log, mark)
        self.command = list(command)
        self.environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, MARK: self.mark},
                start_new_session=True,
            )

    def _join(self) -> int:
        assert self._process is not None
        return self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid


class Function(Part):
    """A function in a spawned process; unlike a command it can be handed objects of this program."""

    def __init__(
        self, name: str, function: Callable[..., None], arguments: tuple[Any, ...], log: Path, mark: str
    ):
        super().__init__(name, log, mark)
        self._process = multiprocessing.get_context("spawn").Process(
            target=_run_logged, args=(str(log), function, *arguments), name=name
        )

    def _launch(self) -> None:
        # The tracker serves the whole program and outlives this training run: it must not carry the mark.
        multiprocessing.resource_tracker.ensure_running()
        with _spawning:
            os.environ[MARK] = self.mark
            try:
                self._process.start()
            except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
                raise TrainerError(
                    f"{self.name} processes cannot be given what they need: {error}; define the agent, hooks "
                    "and tracer in a module, or use start_method='fork' or strategy='shm'"
                ) from error
            finally:
                del os.environ[MARK]

    def _join(self) -> int:
        self._process.join()
        return self._process.exitcode or 0

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, f"{self.name} was not started"
        return self._process.pid


class Forked(Part):
    """A function in a forked process, which needs no pickling.

    It is forked when it is made, before this program uses gRPC or an event loop, and waits for its argument.
    """

    def __init__(self, name: str, function: Callable[[str], None], log: Path, mark: str) -> None:
        super().__init__(name, log, mark)
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._argument = ""
        self._process = context.Process(
            target=_run_forked, args=(str(log), function, theirs, self._ours), name=name
        )
        self._process.start()
        theirs.close()

    def tell(self, argument: str) -> Forked:
        """The function's argument; before `start`."""
        self._argument = argument
        return self

    def _launch(self) -> None:
        self._ours.send(self._argument)

    def _join(self) -> int:
        self._process.join()
        return self._process.exitcode or 0

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, f"{self.name} was not forked"
        return self._process.pid

    def discard(self) -> None:
        """End it if it was never started."""
        if not self.started:
            self._ours.close()
            self._process.join()


def _run_forked(
    log: str, function: Callable[[str], None], argument: Connection, other_end: Connection
) -> None:
    """Runs in the forked process."""
    other_end.close()
    # Ctrl-C is the trainer's affair until we are in a session of our own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_when_parent_dies(signal.SIGTERM)
    try:
        told = argument.recv()
    except EOFError:
        return
    _run_logged(log, function, told)


def _run_logged(log: str, function: Callable[..., None], *arguments: Any) -> None:
    """Runs in the spawned process."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    function(*arguments)


def child_environment(python: str | None = None) -> dict[str, str]:
    """This process's environment for a part: unbuffered, its own tools first, no proxy to this machine."""
    environment = dict(os.environ)
    environment.pop("PYTHONHOME", None)
    environment["PYTHONUNBUFFERED"] = "1"
    for name in ("no_proxy", "NO_PROXY"):
        direct = [part for part in environment.get(name, "").split(",") if part]
        environment[name] = ",".join(dict.fromkeys([*direct, "127.0.0.1", "localhost"]))
    if python is not None:
        folder = str(Path(python).parent)
        environment["PATH"] = os.pathsep.join([folder, environment.get("PATH", "")])
        environment.pop("VIRTUAL_ENV", None)
    return environment
