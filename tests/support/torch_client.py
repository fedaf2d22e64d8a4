"""The test's end of `torch_helper`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support.environments import REPOSITORY, engine_environment, engine_python


class TorchClient:
    """Commands to a process that has torch and transformers; use it as a context manager."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> TorchClient:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [engine_python(), "-m", "tests.support.torch_helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=engine_environment(),
                cwd=REPOSITORY,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def begin(self, do: str, **arguments: Any) -> None:
        """Send a command; `answer` must follow."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The result of the command that was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the torch helper ended:\n{self._log.read_text()[-4000:]}"
        found = json.loads(line)
        assert "error" not in found, found["error"]
        return found["result"]

    def call(self, do: str, **arguments: Any) -> Any:
        """A command and its result."""
        self.begin(do, **arguments)
        return self.answer()
