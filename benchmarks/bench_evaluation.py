"""How long an evaluation takes: 200 questions, 4 answers each, on the tiny model of the calculator example.

The whole command is measured, as a user types it: store, engine and workers are started, every question is
answered, the report is written, and everything is stopped. The target is 60 s on 2 cores. Making the model is
not part of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

from benchmarks.figures import Row, figure, run
from examples.calculator.tasks import validation_tasks
from tests.support.environments import REPOSITORY, engine_environment, learner_python

SECONDS = 60.0
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "64")


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = [learner_python(), "-m", "examples.calculator.model", str(folder / "model")]
        subprocess.run(
            [*model, "--steps", "100"],
            cwd=REPOSITORY,
            env=engine_environment(),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        tasks = folder / "tasks.jsonl"
        questions = validation_tasks(options.questions)
        tasks.write_bytes(b"".join(orjson.dumps(task) + b"\n" for task in questions))
        command = [sys.executable, "-m", "agl_grpc_cli", "eval", str(folder / "model"), str(tasks)]
        command += ["--agent", "examples.calculator.agent:agent", "--n", str(options.samples), "--json"]
        command += ["--run", "measured", "--run-dir", name]
        command += [f"--engine-argument={argument}" for argument in ENGINE]
        paths = [str(REPOSITORY), str(REPOSITORY / "cli")]
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
            stdout=subprocess.PIPE,
        )
        whole = time.monotonic() - began
    found = orjson.loads(done.stdout)["evaluations"][0]
    rollouts = found["figures"]["rollouts"]
    what = f"{options.questions} questions, {options.samples} answers each"
    return [
        figure(f"evaluation, {what}, whole command", "s", whole, f"<= {SECONDS:g}"),
        figure(f"evaluation, {what}, answering and judging", "s", found["seconds"]),
        figure("evaluation, rollouts", "1/s", rollouts / found["seconds"]),
    ]


def main() -> int:
    """Command line."""
    return run(__doc__, measure, questions=(200, "Questions."), samples=(4, "Answers to each."))


if __name__ == "__main__":
    sys.exit(main())
