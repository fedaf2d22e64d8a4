"""Rejection sampling by one command: real vLLM samples, real verl learns the best, the next round begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from agl_grpc import StoreClient
from agl_grpc.model.enums import BatchStatus, PolicyVersionStatus, TrainingRunStatus
from examples.calculator.tasks import training_tasks
from examples.calculator.train import configuration
from tests.e2e.test_evaluate import ENGINE, make_model
from tests.support.environments import REPOSITORY
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROUNDS, TASKS, SAMPLES, KEPT = 2, 8, 8, 2


def run_file(folder: Path) -> Path:
    """The configuration of a run on a tiny model."""
    tasks = folder / "tasks.jsonl"
    tasks.write_bytes(b"".join(orjson.dumps(task) + b"\n" for task in training_tasks(64, 0, frozenset())))
    keys = configuration(make_model(folder / "model", 0), ROUNDS, seed=0, save_every=ROUNDS)
    keys |= {"data.train_batch_size": TASKS, "actor_rollout_ref.actor.ppo_mini_batch_size": TASKS}
    best = {"n": SAMPLES, "keep": KEPT, "min_reward": 0.1, "model_name": "calculator", "seed": 0}
    run = {
        "agent": "examples.calculator.agent:agent",
        "train_dataset": str(tasks),
        "algorithm": {"type": "best_of_n", "config": keys, **best},
        "llm_proxy": {"arguments": [*ENGINE]},
        "run_name": "best",
        "run_dir": str(folder),
    }
    path = folder / "run.json"
    path.write_bytes(orjson.dumps(run))
    return path


async def test_rounds_of_best_of_n(tmp_path: Path) -> None:
    paths = [str(REPOSITORY), str(REPOSITORY / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(  # noqa: ASYNC221  # nothing else happens in this loop
        [sys.executable, "-m", "agl_grpc_cli", "train", "fit", str(run_file(tmp_path))],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [orjson.loads(line) for line in (tmp_path / "best" / "metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # No more than the best two of each of the eight tasks, and the loss of their likelihood.
        assert 0 < line["best_of/rollouts_learned"] <= KEPT * line["best_of/groups_learned"] <= KEPT * TASKS
        assert line["tokens/trained"] + line["tokens/dropped/not_best"] <= line["tokens/captured"]
        assert line["actor/loss"] > 0
        # Sampled by the weights in force: those of the round before.
        assert line["check/logprob_max_difference"] < 1e-4
        assert line["staleness/max"] == 0
    with StoreProcess(tmp_path / "best" / "agl.db") as store:
        async with StoreClient(store.address, run_id="best") as client:
            run = await client.get_training_run_by_id("best-training")
            batches = await client.query_batches("best-training")
            versions = await client.query_policy_versions("calculator")
    assert run is not None
    assert (run.algorithm, run.status) == ("best_of_n", TrainingRunStatus.SUCCEEDED)
    assert [(batch.status, len(batch.entries)) for batch in batches] == [
        (BatchStatus.COMMITTED, TASKS * SAMPLES)
    ] * ROUNDS
    committed = [each.policy_version for each in versions if each.status is PolicyVersionStatus.COMMITTED]
    assert sorted(committed) == [1, 2]
    checkpoint = tmp_path / "best" / "checkpoints" / f"global_step_{ROUNDS}" / "actor" / "huggingface"
    assert (checkpoint / "model.safetensors").is_file()
