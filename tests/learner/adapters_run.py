"""`make adapters`: one run trains two adapters of one model in one engine, each by its own calls.

Everything is real: store, worker, vLLM, and two learners with verl. What it found is printed and, with
``--write``, kept in benchmarks/results/adapters.json. It is run by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.client import StoreClient
from agl_grpc.model import ProxyLLM
from agl_grpc.model.enums import BatchStatus, TrainingRunStatus
from tests.interceptor.engine import Engine, engine
from tests.learner.hybrid_run import ended, environment, process
from tests.learner.two_agents import TURN
from tests.support.environments import REPOSITORY, learner_python
from tests.support.store_process import StoreProcess

NAMES = ("planner", "solver")
PROMPTS, ROLLOUTS, STEPS, RANK = 4, 8, 12, 8
RESULT = REPOSITORY / "benchmarks" / "results" / "adapters.json"


def make_model(folder: Path) -> Path:
    """The tiny model, of which both are adapters."""
    command = [learner_python(), "-m", "tests.support.tiny_model", str(folder)]
    subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True, stdout=sys.stderr)
    return folder


def configure(folder: Path, model: Path, name: str, steps: int) -> Path:
    """A learner's configuration: LoRA, under the name by which the engine serves it."""
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(f'{{"n": {number}}}\n' for number in range(PROMPTS * steps)))
    of_both = {"planner": {"followers": ["solver"]}, "solver": {"follows": "tr_planner"}}
    config = {
        "model": {"path": str(model), "name": name},
        "train_tasks": str(tasks),
        "output_dir": str(folder / name),
        "training_run_id": f"tr_{name}",
        "deadlines": {"sample": 120, "publish": 60, "engines": 120},
        # What is left to sample after four tokens is no truncated answer here.
        "samples": {"truncated": "train"},
        **of_both[name],
        "verl": {
            "data.train_batch_size": PROMPTS,
            "actor_rollout_ref.rollout.n": ROLLOUTS,
            "actor_rollout_ref.model.lora_rank": RANK,
            "actor_rollout_ref.model.lora_alpha": 2 * RANK,
            "actor_rollout_ref.model.target_modules": "all-linear",
            "actor_rollout_ref.actor.optim.lr": 2e-2,
            "trainer.total_training_steps": steps,
            "trainer.save_freq": steps,
        },
    }
    path = folder / f"{name}.json"
    path.write_bytes(orjson.dumps(config))
    return path


async def drive(store: str, running: Engine, folder: Path, steps: int) -> dict[str, Any]:
    """Starts learners and worker, and collects what the store knows at the end."""
    began = time.monotonic()
    work = [sys.executable, "-m", "agl_grpc_cli", "runner", "start", "--store", store, "--concurrency", "32"]
    work += ["--agent", "tests.learner.two_agents:agent", "--wait-for-resources"]
    async with StoreClient(store) as client:
        llms = {name: ProxyLLM(endpoint=f"{running.url}/v1", model=name) for name in NAMES}
        await client.update_resources("adapters", llms)
        with ExitStack() as stack:
            stack.enter_context(process("runner", folder, work))
            learners = {}
            for name in NAMES:
                config = configure(folder, running.model, name, steps)
                command = [learner_python(), "-m", "agl_grpc_cli", "learner", "--config", str(config)]
                learners[name] = stack.enter_context(process(name, folder, [*command, "--store", store]))
            for name, learner in learners.items():
                assert await ended(learner) == 0, (folder / f"{name}.log").read_text()[-4000:]
        found = {name: await collect(client, name, steps) for name in NAMES}
        rollouts = await client.query_rollouts()
    for rollout in found["planner"]["trained"], found["solver"]["trained"]:
        assert len(rollout) == len(set(rollout)) == len(rollouts)
    # The same rollouts, in the same order; no two sets of weights are the same.
    assert found["planner"].pop("trained") == found["solver"].pop("trained")
    digests = [digest for each in found.values() for digest in each.pop("digests")]
    assert len(digests) == len(set(digests)) == 2 * steps
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "rollouts": len(rollouts), "engines": 1, **found}


async def collect(client: StoreClient, name: str, steps: int) -> dict[str, Any]:
    """Asserts that every step was trained once, on this adapter's calls, sampled by its newest weights."""
    record = await client.get_training_run_by_id(f"tr_{name}")
    assert record is not None
    assert record.status is TrainingRunStatus.SUCCEEDED
    batches = await client.query_batches(f"tr_{name}")
    assert [batch.step for batch in batches] == list(range(1, steps + 1))
    assert {batch.status for batch in batches} == {BatchStatus.COMMITTED}
    curve: dict[int, dict[str, float]] = {}
    async for _, steps_found in client.watch_training_run(f"tr_{name}"):
        curve.update({each.step: dict(each.metrics) for each in steps_found if each.step})
    for step in curve.values():
        trained = PROMPTS * ROLLOUTS * TURN
        assert step["tokens/trained"] == step["check/logprob_tokens_compared"] == trained
        assert step["staleness/tokens/0"] == trained
        assert step["check/logprob_max_difference"] < 1e-4
    rewards = [round(curve[step]["reward/mean"], 3) for step in sorted(curve)]
    assert rewards[-1] > rewards[0]
    versions = await client.query_policy_versions(name)
    engines = await client.query_engines(name)
    assert [each.active_policy_version for each in engines] == [steps]
    return {
        "trained": [entry.rollout_id for batch in batches for entry in batch.entries],
        "digests": [item.weights_digest for item in versions],
        "engine": engines[0].engine_id,
        "rewards": rewards,
        "logprob_max_difference": max(step["check/logprob_max_difference"] for step in curve.values()),
        "bytes_of_a_version": max(step["weights/bytes"] for step in curve.values()),
        "pause_seconds_max": max(step["weights/pause_seconds"] for step in curve.values()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train two adapters of one model through one engine.")
    parser.add_argument("--folder", type=Path, help="where everything lies; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT.name}")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="agl-adapters-"))
    folder.mkdir(parents=True, exist_ok=True)
    options = [item for name in NAMES for item in ("--adapter", name)]
    model = make_model(folder / "model")
    with (
        StoreProcess(folder / "store.db") as store,
        engine(model, store.address, folder, "--run", "default", *options) as running,
    ):
        found = asyncio.run(drive(store.address, running, folder, arguments.steps))
    text = orjson.dumps(found, option=orjson.OPT_INDENT_2).decode()
    print(text)
    if arguments.write:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
