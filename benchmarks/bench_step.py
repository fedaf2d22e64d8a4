"""What a training step costs beside sampling and optimising.

The real learner on a real store, with an engine and a worker over the contract; the model is tiny, so nearly
all of a step is orchestration: prompts to the store and leases, samples read from it, the claim, Ray, proofs,
advantages, the publication of new weights (transfer and swap), reports. It is what is left of the time from
one report to the next when the time is taken off in which agents sample (from the lease of rollouts to their
completion) or verl's engine computes: the update, and the recomputed logprobs (a reference's and a critic's
values, where a run has them), which are passes of the trained model too. What a learner does while agents
sample is not counted, as it delays nothing; what delays them is. The target is 5 % of a step of 2 seconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson

from benchmarks import work_times
from benchmarks.engine_times import VARIABLE
from benchmarks.figures import Row, figure, median, run
from tests.learner.runs import Learner
from tests.support.environments import learner_environment, learner_python
from tests.support.store_process import StoreProcess

STEP_SECONDS = 2.0
SHARE = 0.05
_FIRST = 5
"""Steps that warm up."""


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name, StoreProcess(Path(name) / "store.db") as store:
        folder = Path(name)
        _make_model(folder)
        optimised, sampled = folder / "optimised", folder / "sampled"
        reported: list[float] = []

        def note(line: str) -> None:
            if line.startswith("learner: step "):
                reported.append(time.time())

        command = [learner_python(), "-m", "benchmarks.timed_agents", str(sampled), store.address, "default"]
        engine = subprocess.Popen(
            [*command, str(folder / "model"), "tiny"],
            env=learner_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with patch.dict(os.environ, {VARIABLE: str(optimised)}):
                learner = Learner(_configure(folder, options), store.address, on_line=note)
                if learner.finish():
                    sys.exit("\n".join(learner.lines[-20:]))
        finally:
            engine.kill()
            engine.wait()
        return _figures(learner.lines, reported, optimised, sampled, options)


def _make_model(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.learner.trainer_script import make_tasks; "
    command = [learner_python(), "-c", code + "make_tasks(Path(sys.argv[1]))", str(folder)]
    subprocess.run(command, env=learner_environment(), check=True, capture_output=True)


def _configure(folder: Path, options: argparse.Namespace) -> Path:
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "name": "tiny"},
        "train_tasks": str(folder / "tasks.jsonl"),
        "output_dir": str(folder / "out"),
        "verl": {
            "data.train_batch_size": options.rollouts // 8,
            "actor_rollout_ref.rollout.n": 8,
            "actor_rollout_ref.model.external_lib": "benchmarks.engine_times",
            "trainer.total_epochs": 1000,
            "trainer.total_training_steps": _FIRST + options.steps,
            "trainer.save_freq": -1,
        },
    }
    path = folder / "run.json"
    path.write_bytes(orjson.dumps(config))
    return path


def _figures(
    lines: list[str], reported: list[float], optimised: Path, sampled: Path, options: argparse.Namespace
) -> list[Row]:
    computing, sampling = work_times.read(optimised), work_times.read(sampled)
    publications = [_phase(line, "publish") for line in lines if line.startswith("learner: step ")]
    steps = list(itertools.pairwise(reported))[_FIRST - 1 :]
    left = [end - start - work_times.within(computing + sampling, start, end) for start, end in steps]
    size = f"{options.rollouts} rollouts"
    share = median(left) / STEP_SECONDS
    return [
        figure(
            f"orchestration of a step, {size}",
            "ms",
            1000 * median(left),
            f"<= {1000 * STEP_SECONDS * SHARE:g}",
        ),
        figure(f"orchestration of a step, {size}, share of 2 s", "%", 100 * share, f"<= {100 * SHARE:g}"),
        figure("of which publication of weights", "ms", 1000 * median(publications[_FIRST:])),
        figure(
            "optimising in the same step (verl's engine)",
            "ms",
            1000 * median([work_times.within(computing, *step) for step in steps]),
        ),
        figure(
            "sampling in the same step (agents and engine)",
            "ms",
            1000 * median([work_times.within(sampling, *step) for step in steps]),
        ),
    ]


def _phase(line: str, name: str) -> float:
    """Seconds of a phase in a learner's line; 0 = too few to be named."""
    phases = line.partition(" s (")[2]
    _, found, rest = phases.partition(f"{name} ")
    return float(rest.split(",")[0].rstrip(")")) if found else 0.0


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            rollouts=(64, "rollouts of a batch, in groups of 8"),
            steps=(30, "steps that are measured"),
        )
    )
