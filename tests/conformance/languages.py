"""How each language's client is built and replays the vectors."""

from __future__ import annotations

import fcntl
import hashlib
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
_WORK = ROOT / ".work"


@dataclass(frozen=True)
class Language:
    """A client: the commands that build it in its folder, and the one that replays ``HOST:PORT FOLDER``."""

    folder: Path
    build: Sequence[Sequence[str]]
    replay: Sequence[str]
    built_into: Sequence[str] = ()
    """Folders of the client that its build makes anew; without any a build leaves what has not changed."""

    def make(self) -> None:
        """Builds the client, once in a process; `AssertionError` with the output when that fails.

        Processes build one after the other, and what another has built of the same files stays as it is:
        it may be in use there.
        """
        if self.folder in _MADE or not self.build:
            return
        _WORK.mkdir(exist_ok=True)
        with (_WORK / f"{self.folder.name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = self._sources()
            lock.seek(0)
            there = [(self.folder / name).is_dir() for name in self.built_into]
            if not there or not all(there) or lock.read() != made:
                for command in self.build:
                    run(command, self.folder)
                lock.truncate(0)
                lock.write(made)
        _MADE.add(self.folder)

    def _sources(self) -> str:
        """A hash of the files that the client is built from."""
        found = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder).parts
            if inside[0] not in self.built_into and path.is_file():
                found.update(str(inside).encode() + path.read_bytes())
        return found.hexdigest()

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
"""Where the C++ client is built to be tested; what has not changed is not built again."""


def cpp_build(folder: Path, build_type: str, *targets: str) -> tuple[tuple[str, ...], ...]:
    """The commands, for the client's folder, that build programs of it; the type "None" = not optimised."""
    configure = ("-S", ".", "-B", str(folder), "-DAGL_GRPC_PROGRAMS=ON", f"-DCMAKE_BUILD_TYPE={build_type}")
    return (
        (CPP, "cmake", *configure),
        (CPP, "cmake", "--build", str(folder), "-j", "2", "--target", *targets),
    )


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
        ("node_modules", "dist"),
    ),
    "cpp": Language(
        ROOT / "clients" / "cpp",
        cpp_build(CPP_BUILD, "None", "replay", "agl_grpc_tests"),
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
