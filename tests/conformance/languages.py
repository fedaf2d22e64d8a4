"""How each language's client is built and replays the vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.replay import VECTORS

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600.0
_MADE: set[Path] = set()


@dataclass(frozen=True)
class Language:
    """A client: the commands that build it in its folder, and the one that replays ``HOST:PORT FOLDER``."""

    folder: Path
    build: Sequence[Sequence[str]]
    replay: Sequence[str]

    def make(self) -> None:
        """Builds the client, once in a process; `AssertionError` with the output when that fails."""
        if self.folder not in _MADE:
            for command in self.build:
                run(command, self.folder)
            _MADE.add(self.folder)

    def outcomes(self, target: str) -> dict[str, str]:
        """For each vector ``ok`` or what is wrong."""
        output = run([*self.replay, target, str(VECTORS)], self.folder, check=False)
        lines = [line for line in output.splitlines() if line.startswith(("ok ", "FAILED "))]
        assert lines, f"nothing was replayed:\n{output}"
        return dict(_outcome(line) for line in lines)


GO = str(ROOT / ".venv-go" / "go")
"""Go as `make go-tools` unpacks it; it runs in the client's folder."""

CPP = str(ROOT / ".venv-cpp" / "with")
"""Runs a program with the libraries of C++ as `make cpp-tools` unpacks them."""

CPP_BUILD = ROOT / ".venv-cpp" / "build"
"""Where the C++ client is built, with its programs; what has not changed is not built again."""

_CONFIGURE = ("-DAGL_GRPC_PROGRAMS=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")

LANGUAGES: Mapping[str, Language] = {
    "python": Language(ROOT, (), (sys.executable, "-m", "tests.conformance.replay")),
    "go": Language(
        ROOT / "clients" / "go",
        ((GO, "build", "-o", str(ROOT / ".venv-go" / "replay"), "./cmd/replay"),),
        (str(ROOT / ".venv-go" / "replay"),),
    ),
    "typescript": Language(
        ROOT / "clients" / "typescript",
        (("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"), ("npm", "run", "--silent", "build")),
        ("node", "dist/conformance/replay.js"),
    ),
    "cpp": Language(
        ROOT / "clients" / "cpp",
        (
            (CPP, "cmake", "-S", ".", "-B", str(CPP_BUILD), *_CONFIGURE),
            (CPP, "cmake", "--build", str(CPP_BUILD), "-j", "2"),
        ),
        (CPP, str(CPP_BUILD / "replay")),
    ),
}


def run(command: Sequence[str], folder: Path, *, check: bool = True, limit: float = LIMIT_SECONDS) -> str:
    """The output of a program run in a client's folder; `AssertionError` when it fails."""
    environment = {**os.environ, "AGL_GRPC_COMMAND": f"{sys.executable} -m agl_grpc_cli"}
    paths = [str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        timeout=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, (
        f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}"
    )
    return done.stdout


def _outcome(line: str) -> tuple[str, str]:
    state, _, rest = line.partition(" ")
    name, _, complaint = rest.partition(": ")
    return name, "ok" if state == "ok" else complaint
