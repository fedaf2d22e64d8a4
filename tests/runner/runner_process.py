"""A real `agl-grpc runner start` in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import psutil

from tests.runner.agents import FOLDER

ROOT = Path(__file__).parents[2]


class RunnerProcess:
    """A supervisor with its workers; a context manager.

    The agent is one of `tests.runner.agents`, an import path, or None: the options say.
    """

    def __init__(
        self,
        store: str,
        agent: str | None,
        folder: Path,
        *options: str,
        name: str = "w",
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self._command = [python, "-m", "agl_grpc_cli", "runner", "start", "--store", store]
        self._command += ["--name", name, *options]
        if agent is not None:
            path = agent if ":" in agent else f"tests.runner.agents:{agent}"
            self._command += ["--agent", path]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the supervisor; workers follow."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=ROOT, env=self.environment()
            )

    def environment(self) -> dict[str, str]:
        """Of the runner: this checkout first, for a Python of another environment too."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
        return os.environ | {FOLDER: str(self.folder), "PYTHONPATH": paths}

    def workers(self) -> list[psutil.Process]:
        """The worker processes that run now."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def terminate(self) -> None:
        """SIGTERM to the supervisor."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within: float = 15.0) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(within)

    def says(self, text: str) -> bool:
        """Whether its log holds this text."""
        return text in self.log.read_text()

    def notes(self, name: str) -> list[str]:
        """Lines that its agents noted under this name."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def open_gate(self, name: str) -> None:
        """Lets agents pass that wait at this gate."""
        (self.folder / name).touch()

    def __enter__(self) -> RunnerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            for process in [*self.workers(), psutil.Process(self.process.pid)]:
                process.kill()
            self.process.wait()
