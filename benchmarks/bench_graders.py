"""What graders cost: Python grades in their process, sandboxed commands with all limits on.

Grades go through the worker's own path to the process and back (a submission pickled, a verdict pickled),
without the store; commands are counted per processor second of sandbox and command together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import sys
from pathlib import Path

from agl_grpc.grader import Limits, Sandbox, Submission, grader
from agl_grpc.grader.isolated import GraderProcesses
from agl_grpc.grader.sandbox import BWRAP_VARIABLE
from benchmarks.figures import Row, figure, run

_UNPACKED = Path(__file__).parents[1] / ".venv-sandbox" / "usr" / "bin" / "bwrap"


@grader
def exact(response: str) -> float:
    """The least that a grader does."""
    return float(response == "4")


def _cpu() -> float:
    """Processor seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def grades(count: int) -> float:
    """Grades a processor second. One process answers one submission at a time: the two never overlap."""
    from benchmarks.bench_graders import exact as importable

    processes = GraderProcesses([importable], 1)
    one = Submission(input={"answer": "4"}, response="4", messages=[{"role": "user", "content": "2+2?"}])
    loop = asyncio.get_running_loop()
    try:
        await processes.grade(0, one, 60.0)
        begun = loop.time()
        for _ in range(count):
            await processes.grade(0, one, 60.0)
        return count / (loop.time() - begun)
    finally:
        await processes.close()


async def commands(count: int) -> float:
    """Sandboxed commands a processor second, their own time included."""
    box = Sandbox(limits=Limits(wall_seconds=60.0))
    await box.check()
    begun = _cpu()
    for _ in range(count):
        done = await box.run(["echo", "1"], b"{}")
        assert done.outcome == "ok", done
    return count / (_cpu() - begun)


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    os.environ.setdefault(BWRAP_VARIABLE, shutil.which("bwrap") or str(_UNPACKED))
    return [
        figure("Python grades, one process", "1/s", asyncio.run(grades(options.grades)), "≥ 1,000"),
        figure("sandboxed commands, per core", "1/s", asyncio.run(commands(options.commands)), "≥ 20"),
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, grades=(5000, "grades"), commands=(100, "commands")))
