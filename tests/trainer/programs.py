"""Users' programs that train, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
VARIABLES = ("AGL_CURRENT_ROLE", "AGL_SERVER_HOST", "AGL_SERVER_PORT", "AGL_MANAGED_STORE")


@contextmanager
def program(folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A user's program; whatever is left of its processes is ended at the end."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", **variables}
    command = [sys.executable, "-m", "tests.trainer.strategy_script", *arguments, str(folder)]
    with (folder / f"{'-'.join(arguments)}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        for left in descendants(process):
            left.kill()
        process.kill()
        process.wait()


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes that the program has started, directly or not."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def printed(folder: Path, *arguments: str) -> str:
    """What the program has printed."""
    return (folder / f"{'-'.join(arguments)}.log").read_text(errors="replace")
