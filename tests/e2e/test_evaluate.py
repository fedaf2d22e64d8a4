"""Two checkpoints evaluated and compared by one command: real vLLM, the example's agent, a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest

from agl_grpc import StoreClient
from agl_grpc.evaluation import Evaluation
from agl_grpc.model import RolloutMode
from examples.calculator.tasks import validation_tasks
from tests.support.environments import REPOSITORY, engine_environment, learner_python
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TASKS, SAMPLES = 24, 2
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32")


def make_model(folder: Path, seed: int) -> Path:
    command = [learner_python(), "-m", "examples.calculator.model", str(folder), "--steps", "40"]
    subprocess.run(
        [*command, "--seed", str(seed)],
        cwd=REPOSITORY,
        env=engine_environment(),
        check=True,
        capture_output=True,
    )
    return folder


async def test_two_checkpoints_are_compared_on_answers_drawn_apart(tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(b"".join(orjson.dumps(task) + b"\n" for task in validation_tasks(TASKS)))
    command = [sys.executable, "-m", "agl_grpc_cli", "eval", str(models[1]), str(tasks)]
    command += ["--agent", "examples.calculator.agent:agent", "--compare", str(models[0]), "--seed", "5"]
    command += ["--n", str(SAMPLES), "--run", "both", "--run-dir", str(tmp_path / "runs"), "--json"]
    command += ["--field", "question", "--field", "answer", "--temperature", "0.8"]
    command += [f"--engine-argument={argument}" for argument in ENGINE]
    paths = [str(REPOSITORY), str(REPOSITORY / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(  # noqa: ASYNC221  # nothing else happens in this loop
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = orjson.loads(done.stdout)
    assert [each["name"] for each in told["evaluations"]] == ["first", "second"]
    assert told["comparison"]["total"]["tasks"] == TASKS
    assert "shared tasks" in told["comparison"]["sentence"]
    folder = tmp_path / "runs" / "both"
    assert (folder / "report.html").read_text().count("<svg") >= 3
    found = Evaluation.read(folder)
    assert found.figures.rollouts == TASKS * SAMPLES
    assert not found.failures
    await _check_calls(folder / "agl.db", "both")


async def _check_calls(database: Path, run: str) -> None:
    """No two model calls share a seed: answers drawn with the same random numbers are no sample of tasks."""
    seeds: Counter[int] = Counter()
    with StoreProcess(database) as store:
        async with StoreClient(store.address, run_id=run) as client:
            rollouts = await client.query_rollouts()
            assert {rollout.mode for rollout in rollouts} == {RolloutMode.VAL}
            for rollout in rollouts:
                spans = await client.query_spans(rollout.rollout_id, "latest")
                calls = [span.model_call for span in spans.items if span.model_call is not None]
                assert all(call.sampling["temperature"] == pytest.approx(0.8) for call in calls)
                seeds.update(call.sampling["seed"] for call in calls)
    assert seeds.total() >= TASKS * SAMPLES
    assert set(seeds.values()) == {1}
