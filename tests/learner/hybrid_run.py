"""`make hybrid`: verl starts vLLM beside its ranks, with our interceptor inside; an agent learns through it.

Everything is real: store, worker, the calculator's agent, verl, and the vLLM that verl starts. It takes some
minutes, mostly for the model and for imports, so it is run by hand; what it found is printed and, with
``--write``, kept in benchmarks/results/hybrid.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.client import StoreClient
from agl_grpc.model import ProxyLLM
from agl_grpc.model.enums import BatchStatus, PolicyVersionStatus, TrainingRunStatus
from examples.calculator.tasks import training_tasks
from tests.support.environments import REPOSITORY, hybrid_python
from tests.support.store_process import StoreProcess

MODEL, TRAINING = "calculator", "tr_hybrid"
PROMPTS, ROLLOUTS, STEPS = 8, 8, 8
ENGINE_SECONDS, RUN_SECONDS = 900.0, 1800.0
RESULT = REPOSITORY / "benchmarks" / "results" / "hybrid.json"


def environment() -> dict[str, str]:
    """Of every process that is started here."""
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'cli'}", "HF_HUB_OFFLINE": "1"}


@contextmanager
def process(name: str, folder: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in a file; it is ended when the block is."""
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            yield started
        finally:
            started.terminate()
            started.wait(60)


def make_model(folder: Path) -> Path:
    """The warm-started model of the example, unless it is there."""
    if not (folder / "config.json").exists():
        command = [hybrid_python(), "-m", "examples.calculator.model", str(folder)]
        subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True, stdout=sys.stderr)
    return folder


def configure(folder: Path, model: Path, steps: int) -> Path:
    """The learner's configuration: GRPO, one engine that verl starts."""
    tasks = training_tasks(PROMPTS * steps, 0, frozenset())
    (folder / "tasks.jsonl").write_bytes(b"".join(orjson.dumps(task) + b"\n" for task in tasks))
    config = {
        "model": {"path": str(model), "name": MODEL},
        "train_tasks": str(folder / "tasks.jsonl"),
        "output_dir": str(folder / "out"),
        "training_run_id": TRAINING,
        "engines": {"hybrid": True},
        "deadlines": {"sample": 300, "publish": 120},
        "verl": {
            "data.train_batch_size": PROMPTS,
            "data.max_response_length": 64,
            "actor_rollout_ref.rollout.n": ROLLOUTS,
            "actor_rollout_ref.rollout.max_model_len": 256,
            "actor_rollout_ref.rollout.max_num_seqs": 64,
            "actor_rollout_ref.rollout.max_num_batched_tokens": 1024,
            "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
            "actor_rollout_ref.actor.optim.lr": 6e-4,
            "trainer.total_training_steps": steps,
            "trainer.save_freq": steps,
        },
    }
    path = folder / "run.json"
    path.write_bytes(orjson.dumps(config))
    return path


async def endpoint_of(client: StoreClient, learner: subprocess.Popen[bytes]) -> str:
    """The address of the engine that verl started, as the engine told the store."""
    async with asyncio.timeout(ENGINE_SECONDS):
        while True:
            engines = [each for each in await client.query_engines(MODEL) if each.connected and each.endpoint]
            if engines:
                return engines[0].endpoint
            assert learner.poll() is None, f"the learner ended with {learner.returncode}"
            await asyncio.sleep(0.2)


async def ended(learner: subprocess.Popen[bytes]) -> int:
    """The learner's exit code."""
    return await asyncio.to_thread(learner.wait, RUN_SECONDS)


async def drive(store: str, folder: Path, config: Path, steps: int) -> dict[str, Any]:
    """Starts learner and worker, and collects what the store knows at the end."""
    began = time.monotonic()
    learn = [hybrid_python(), "-m", "agl_grpc_cli", "learner", "--config", str(config), "--store", store]
    work = [sys.executable, "-m", "agl_grpc_cli", "runner", "start", "--store", store, "--concurrency", "64"]
    work += ["--agent", "examples.calculator.agent:agent", "--wait-for-resources"]
    async with StoreClient(store) as client:
        with process("learner", folder, learn) as learner:
            endpoint = await endpoint_of(client, learner)
            ready = time.monotonic() - began
            parameters = {"temperature": 1.0}
            llm = ProxyLLM(endpoint=f"{endpoint}/v1", model=MODEL, sampling_parameters=parameters)
            await client.update_resources("hybrid", {"main_llm": llm})
            with process("runner", folder, work):
                code = await ended(learner)
        assert code == 0, (folder / "learner.log").read_text()[-4000:]
        return {
            "engine_ready_seconds": round(ready, 1),
            "seconds": round(time.monotonic() - began, 1),
            **await collect(client, steps),
        }


async def collect(client: StoreClient, steps: int) -> dict[str, Any]:
    """Asserts that every step was trained once, on proven tokens of the version before it."""
    record = await client.get_training_run_by_id(TRAINING)
    assert record is not None
    assert record.status is TrainingRunStatus.SUCCEEDED
    batches = await client.query_batches(TRAINING)
    assert [batch.step for batch in batches] == list(range(1, steps + 1))
    assert {batch.status for batch in batches} == {BatchStatus.COMMITTED}
    versions = [
        item
        for item in await client.query_policy_versions(MODEL)
        if item.status is PolicyVersionStatus.COMMITTED
    ]
    assert {item.policy_version for item in versions} == set(range(1, steps + 1))
    metrics = {}
    async for _, found in client.watch_training_run(TRAINING):
        metrics.update({each.step: each.metrics for each in found})
    curve = [metrics[step] for step in sorted(metrics) if step]
    differences = [step["check/logprob_max_difference"] for step in curve]
    assert max(differences) < 1e-4
    assert all(step["staleness/tokens/0"] == step["tokens/trained"] > 0 for step in curve)
    rollouts = await client.query_rollouts()
    return {
        "steps": len(curve),
        "rewards": [round(step["reward/mean"], 3) for step in curve],
        "logprob_max_difference": max(differences),
        "tokens_trained": sum(int(step["tokens/trained"]) for step in curve),
        "policy_versions": len(versions),
        "distinct_digests": len({item.weights_digest for item in versions}),
        "swap_pause_seconds_max": max(step.get("weights/pause_seconds", 0.0) for step in curve),
        "rollouts": dict(Counter(each.status.value for each in rollouts)),
        "engine": (await client.query_engines(MODEL))[0].engine_version,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train through a vLLM that verl starts itself.")
    parser.add_argument("--folder", type=Path, help="where everything lies; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT.name}")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="agl-hybrid-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = configure(folder, make_model(folder / "model"), arguments.steps)
    with StoreProcess(folder / "store.db") as store:
        found = asyncio.run(drive(store.address, folder, config, arguments.steps))
    text = orjson.dumps(found, option=orjson.OPT_INDENT_2).decode()
    print(text)
    if arguments.write:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
