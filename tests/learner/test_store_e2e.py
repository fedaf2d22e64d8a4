"""The learner's process on a real store: rollouts, batches, policy versions, checkpoints, resume."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from agl_grpc_cli.main import app
from typer.testing import CliRunner

from agl_grpc.client import StoreClient
from agl_grpc.learner.training_run import STEP_LABEL
from agl_grpc.model.enums import BatchStatus, PolicyVersionStatus, RolloutStatus, TrainingRunStatus
from agl_grpc.model.training import TrainingRun
from tests.learner.ledger import Ledger
from tests.learner.runs import SAVE, Learner, configure, served
from tests.support.environments import learner_environment, learner_python
from tests.support.scripted_scores import ScriptedScores
from tests.support.store_process import StoreProcess
from tests.support.tensorboard import scalars

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS, MORE_STEPS = 8, 10
KILL_AFTER = 2
# What every step of any run with verl reports.
REPORTED = {
    *("loss/entropy", "loss/clip_fraction", "loss/gradient_norm", "loss/skipped_updates"),
    *("kl/sampler_trainer_k3", "response_length/mean", "answers/truncated", "answers/format_error_rate"),
    *("reward/mean", "reward/groups_without_variance", "grader/agent/primary/mean", "tools/error_rate"),
    *("repetition/distinct_1", "repetition/distinct_2", "repetition/distinct_4", "staleness/mean"),
    *("tokens/captured", "tokens/trained", "tokens/observed", "tokens/dropped", "tokens/unaccounted"),
}


@pytest.fixture
def engine(store: StoreProcess, folder: Path) -> Iterator[None]:
    """Engine and worker over the contract."""
    with served(store, folder, "tiny"):
        yield


async def _state(store: StoreProcess) -> tuple[TrainingRun, list[Any], list[Any], dict[int, float]]:
    async with StoreClient(store.address) as client:
        record = await client.get_training_run_by_id("tr_e2e")
        assert record is not None
        batches = await client.query_batches("tr_e2e")
        versions = await client.query_policy_versions("tiny")
        rewards: dict[int, float] = {}
        async for _, steps in client.watch_training_run("tr_e2e"):
            rewards.update({step.step: step.metrics["reward/mean"] for step in steps})
        return record, batches, versions, rewards


def _targets(text: str) -> float:
    """The share of rewarded tokens among both answers; the prompt holds four such tokens."""
    return (sum(int(number) < 10 for number in re.findall(r"t(\d+)", text)) - 4) / 8


async def test_a_run_survives_the_store_and_continues_from_its_checkpoint(
    store: StoreProcess, engine: None, folder: Path
) -> None:
    def restart_once(line: str) -> None:
        if line.startswith(f"learner: step {KILL_AFTER}/"):
            store.kill()
            store.start()

    with ScriptedScores(_targets) as model:
        # More steps than an alarm, which this run is bound to raise, lets it make; it ends between two saves.
        path = configure(folder, STEPS + 4)
        config = orjson.loads(path.read_bytes()) | {"reward_endpoint": model.endpoint}
        alarms = {"window": 2, "raise_after": STEPS - 3, "entropy_floor": 100.0}
        config["alarms"] = {**alarms, "stop_on": ["entropy_collapse"]}
        config["verl"] |= {
            "trainer.save_freq": STEPS - 1,
            "reward.reward_model.enable": True,
            "reward.reward_model.model_path": str(folder / "model"),
        }
        path.write_bytes(orjson.dumps(config))
        learner = Learner(path, store.address, on_line=restart_once)
        assert learner.finish() == 0, "\n".join(learner.lines[-40:])
    # verl's own worker asked for every rollout once, and its score was the reward; when the alarm stopped the
    # run, rollouts of the next step had been asked for.
    assert {name for name, _ in model.asked} == {str(folder / "model")}
    assert STEPS * 32 <= len(model.asked) <= (STEPS + 1) * 32
    stopping = f"stopping after step {STEPS}: alarm entropy_collapse is in alarms.stop_on"
    assert f"learner: {stopping}" in learner.lines
    record, batches, versions, rewards = await _state(store)
    assert record.status is TrainingRunStatus.STOPPED
    assert record.checkpoint_id == f"global_step_{STEPS}"
    # Whoever follows it in the store reads why.
    async with StoreClient(store.address) as client:
        log = [line.text async for line in client.watch_training_log("tr_e2e")]
    assert log[-1] == stopping
    assert any(line.startswith(f"ALARM entropy_collapse at step {STEPS}: ") for line in log)
    assert sorted(rewards) == list(range(1, STEPS + 1))
    assert rewards[STEPS] > rewards[1]
    assert [batch.step for batch in batches] == list(range(1, STEPS + 1))
    assert {batch.status for batch in batches} == {BatchStatus.COMMITTED}
    trained = [entry.rollout_id for batch in batches for entry in batch.entries]
    assert len(trained) == len(set(trained)) == STEPS * 4 * 8
    committed = [item for item in versions if item.status is PolicyVersionStatus.COMMITTED]
    assert {item.policy_version for item in committed} == set(range(1, STEPS + 1))
    assert len({item.weights_digest for item in committed}) == STEPS
    assert (folder / "out" / "checkpoints" / f"global_step_{STEPS}" / "learner.json").is_file()
    lines = [orjson.loads(line) for line in (folder / "out" / "metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["kl/sampler_trainer_k3"] < 1e-6 for line in lines} == {True}
    assert (
        {line["loss/skipped_updates"] for line in lines}
        == {line["tokens/unaccounted"] for line in lines}
        == {0.0}
    )
    shown = scalars(folder / "out" / "tensorboard")
    assert set(shown) >= set(lines[-1]) - {"step", "time"} >= REPORTED
    assert shown["reward/mean"] == {step: pytest.approx(value) for step, value in rewards.items()}
    # The tool fails for the tasks whose answers are malformed too.
    failed = [line["tools/error_rate"] for line in lines]
    assert failed == [line["answers/format_error_rate"] for line in lines]
    assert 0.0 < sum(failed) < STEPS
    raised = {name for line in lines for name, value in line.items() if name.startswith("alarm/") and value}
    # Whether the engine waits for the learner is this machine's affair, and its store was away for a while.
    assert raised - {"alarm/engine_starved", "alarm/optimiser_starved"} == {"alarm/entropy_collapse"}
    events = [orjson.loads(line) for line in (folder / "out" / "alarms.jsonl").read_bytes().splitlines()]
    assert [each["step"] for each in events if each["name"] == "entropy_collapse"] == [STEPS]
    assert (
        lines[0]["grader/verl/verl/mean"] == lines[0]["reward/mean"] != lines[0]["grader/agent/primary/mean"]
    )
    scores = sum(_targets(text) for _, text in model.asked[: STEPS * 32])
    assert scores == pytest.approx(sum(entry.reward or 0.0 for batch in batches for entry in batch.entries))
    pages = sorted(each.name for each in (folder / "out" / "trajectories").glob("*.html"))
    assert pages[-1] == f"step-{STEPS:06d}.html"
    await _asked_as_soon_as_their_weights_served(store)
    await _learns_the_best_of_its_rollouts(store, folder)


async def _asked_as_soon_as_their_weights_served(store: StoreProcess) -> None:
    """A step's rollouts were asked for after the weights of the step before were published and before that
    step was reported."""
    async with StoreClient(store.address) as client:
        rollouts = await client.query_rollouts()
        versions = await client.query_policy_versions("tiny")
        reported = {
            item.step: item.time async for _, steps in client.watch_training_run("tr_e2e") for item in steps
        }
    for step in range(2, STEPS + 2):
        asked = [item.start_time for item in rollouts if item.labels[STEP_LABEL] == str(step)]
        (before,) = (item.end_time for item in versions if item.policy_version == step - 1)
        after = reported[step - 1]
        assert len(asked) == 32
        assert before is not None
        assert after is not None
        assert before <= min(asked) <= max(asked) <= after


async def _learns_the_best_of_its_rollouts(store: StoreProcess, folder: Path) -> None:
    """Supervised fine-tuning on what the run left in the store; both faces of a run are the same rows."""
    config = orjson.loads((folder / "run.json").read_bytes())
    config |= {"training_run_id": "tr_sft", "output_dir": str(folder / "sft")}
    config["sft"] = {"min_reward": 0.5, "best_of_group": 2, "epochs": 3}
    config["verl"] = {"data.train_batch_size": 16, "actor_rollout_ref.actor.optim.lr": 5e-3}
    path = folder / "sft.json"
    path.write_bytes(orjson.dumps(config))
    learner = Learner(path, store.address, "--sft")
    assert learner.finish() == 0, "\n".join(learner.lines[-40:])
    async with StoreClient(store.address) as client:
        record = await client.get_training_run_by_id("tr_sft")
        losses = [
            step.metrics["sft/loss"]
            async for _, steps in client.watch_training_run("tr_sft")
            for step in steps
        ]
        # Those that nobody judged, as the run was stopped before, are not sealed.
        rollouts = [item for item in await client.query_rollouts() if item.sealed]
        verdicts = await client.query_rewards([item.rollout_id for item in rollouts])
    assert record is not None
    assert (record.status, record.algorithm) == (TrainingRunStatus.SUCCEEDED, "sft")
    groups = {item.rollout_id: item.group_id for item in rollouts}
    rewards: dict[str | None, list[float]] = {}
    for verdict in verdicts:
        if verdict.name == "verl":
            rewards.setdefault(groups[verdict.rollout_id], []).append(verdict.value or 0.0)
    kept = sum(min(2, sum(reward >= 0.5 for reward in group)) for group in rewards.values())
    said = f"learner: {kept} of {len(rollouts)} rollouts are good enough: {kept} rows"
    assert said in learner.lines
    assert len(losses) == 3 * -(-kept // 16)
    assert losses[-1] < losses[0] - 0.2
    checkpoint = folder / "sft" / "checkpoints" / record.checkpoint_id
    assert (checkpoint / "actor" / "huggingface" / "model.safetensors").is_file()
    # Nothing is good enough for this: one line, and the run has failed.
    config |= {"training_run_id": "tr_none", "sft": {"min_reward": 2.0}}
    path.write_bytes(orjson.dumps(config))
    none = Learner(path, store.address, "--sft")
    assert none.finish() == 1
    assert none.lines[-1].startswith("error: no rollout of run 'default' has rows and a reward of 2 or more")


async def test_a_stopped_learner_trains_the_same_batches_again_and_makes_no_rollout_twice(
    store: StoreProcess, engine: None, folder: Path
) -> None:
    config = configure(folder, MORE_STEPS)

    def stop(line: str) -> None:
        if line.startswith(f"learner: step {SAVE + 2}/"):
            first.process.terminate()

    # It is asked to end, by SIGTERM, between two checkpoints.
    first = Learner(config, store.address, on_line=stop)
    assert first.finish() == 130, "\n".join(first.lines[-40:])
    assert first.lines[-1] == "error: stopped by SIGTERM"
    assert (await _state(store))[0].status is TrainingRunStatus.STOPPED
    second = Learner(config, store.address, "--resume")
    assert second.finish() == 0, "\n".join(second.lines[-40:])
    steps = [line for line in second.lines if line.startswith("learner: step ")]
    assert steps[0].startswith(f"learner: step {SAVE + 1}/")
    record, batches, versions, _ = await _state(store)
    assert record.status is TrainingRunStatus.SUCCEEDED
    assert record.trainer_epoch == 2
    committed = [batch for batch in batches if batch.status is BatchStatus.COMMITTED]
    assert [batch.step for batch in committed] == list(range(1, MORE_STEPS + 1))
    assert [batch.trainer_epoch for batch in committed] == [1] * SAVE + [2] * (MORE_STEPS - SAVE)
    trained = [entry.rollout_id for batch in committed for entry in batch.entries]
    assert len(trained) == len(set(trained)) == MORE_STEPS * 4 * 8
    # What the stopped one had trained after the checkpoint was given back, and is the same again, ...
    released = [batch for batch in batches if batch.status is BatchStatus.RELEASED]
    assert [batch.step for batch in released][:2] == [SAVE + 1, SAVE + 2]
    hashes = {batch.step: batch.content_hash for batch in committed}
    assert [batch.content_hash for batch in released] == [hashes[batch.step] for batch in released]
    # ... down to the weights that came of it, ...
    digests: dict[str, set[str]] = {}
    for item in versions:
        if item.status is PolicyVersionStatus.COMMITTED:
            step = item.source.group_id.split("/")[-2]
            digests.setdefault(step, set()).add(item.weights_digest)
    assert {step: len(found) for step, found in digests.items()} == dict.fromkeys(digests, 1)
    numbers = [item.policy_version for item in versions if item.status is PolicyVersionStatus.COMMITTED]
    assert len(numbers) == len(set(numbers)) >= MORE_STEPS + 2
    # ... and no rollout that had succeeded was made again.
    async with StoreClient(store.address) as client:
        rollouts = await client.query_rollouts()
    succeeded = {item.rollout_id for item in rollouts if item.status is RolloutStatus.SUCCEEDED}
    print(f"{len(rollouts)} rollouts, {len(rollouts) - len(succeeded)} of them cancelled")
    assert succeeded == set(trained)


def _lives(config: Path, store: StoreProcess, ledger: Path) -> list[int]:
    """Exit codes of the learners of `store_lives.py`."""
    command = [learner_python(), "-m", "tests.learner.store_lives", str(config), store.address, str(ledger)]
    done = subprocess.run(
        command, env=learner_environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr[-4000:])
    codes: list[int] = orjson.loads(done.stdout.splitlines()[-1])
    return codes


async def test_learners_killed_at_any_point_train_every_batch_once_and_a_claimed_one_as_it_was(
    store: StoreProcess, engine: None, folder: Path
) -> None:
    """Eight learners killed with SIGKILL between claim, step and save, on one Ray cluster; see `KILLS`."""
    steps = 8
    config = orjson.loads(configure(folder, steps).read_bytes())
    config["verl"]["trainer.save_freq"] = 2
    path = folder / "lives.json"
    path.write_bytes(orjson.dumps(config))
    assert _lives(path, store, folder / "ledger") == [-signal.SIGKILL] * 8 + [0]
    points = [point for (point,) in Ledger(folder / "ledger").facts("killed")]
    assert len(points) == len(set(points)) == 8
    record, batches, versions, rewards = await _state(store)
    assert (record.status, record.trainer_epoch) == (TrainingRunStatus.SUCCEEDED, 9)
    assert sorted(rewards) == list(range(1, steps + 1))
    committed = [batch for batch in batches if batch.status is BatchStatus.COMMITTED]
    assert [batch.step for batch in committed] == list(range(1, steps + 1))
    trained = [entry.rollout_id for batch in committed for entry in batch.entries]
    assert len(trained) == len(set(trained)) == steps * 4 * 8
    # What was claimed and not committed was released, and is the same batch every time.
    released = [batch for batch in batches if batch.status is BatchStatus.RELEASED]
    assert [sum(batch.step == step for batch in released) for step in range(1, steps + 1)] == [
        *(3, 2, 2, 2),
        *(1, 0, 1, 0),
    ]
    hashes = {batch.step: batch.content_hash for batch in committed}
    assert [batch.content_hash for batch in released] == [hashes[batch.step] for batch in released]
    # So are the weights that came of it, whichever learner published them.
    digests: dict[str, set[str]] = {}
    for item in versions:
        if item.status is PolicyVersionStatus.COMMITTED:
            digests.setdefault(item.source.group_id.split("/")[-2], set()).add(item.weights_digest)
    assert {step: len(found) for step, found in digests.items()} == dict.fromkeys(digests, 1)
    assert len(digests) >= steps


SEEDS = {"one": 7, "two": 7, "other": 8}


def _seeded(folder: Path, name: str, seed: int) -> Path:
    """The configuration of a short run of its own, with a seed."""
    config = orjson.loads(configure(folder, 2).read_bytes())
    config |= {"run_id": name, "training_run_id": f"tr-{name}", "output_dir": str(folder / name)}
    config |= {"seed": seed, "request_seeds": True}
    config["verl"]["trainer.save_freq"] = -1
    path = folder / f"{name}.json"
    path.write_bytes(orjson.dumps(config))
    return path


def _differences(a: Path, b: Path) -> dict[tuple[str, str], Any]:
    """What `agl-grpc run diff` says, by section and key."""
    done = CliRunner().invoke(app, ["run", "diff", str(a), str(b), "--json"])
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)["differences"]
    return {(each["section"], each["key"]): (each["a"], each["b"]) for each in found}


async def test_two_runs_of_one_seed_train_the_same_and_their_difference_is_their_name(
    store: StoreProcess, folder: Path
) -> None:
    """Tasks, tokens, rewards and weights of two steps; with another seed they are others, and it is named."""
    async with StoreClient(store.address) as client:
        for name in SEEDS:
            await client.create_run(name)
    paths = [str(_seeded(folder, name, seed)) for name, seed in SEEDS.items()]
    with served(store, folder, "tiny", runs=tuple(SEEDS)):
        command = [learner_python(), "-m", "tests.learner.seeds_script", store.address, *paths]
        done = subprocess.run(  # noqa: ASYNC221  # nothing else happens in this loop
            command, env=learner_environment(), capture_output=True, text=True, timeout=400, check=False
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    batches: dict[str, list[list[tuple[str, float | None]]]] = {}
    weights: dict[str, list[str | None]] = {}
    for name in SEEDS:
        async with StoreClient(store.address, run_id=name) as client:
            claimed = await client.query_batches(f"tr-{name}")
            versions = await client.query_policy_versions("tiny")
        # Place, task and number of each rollout stand behind the run's name.
        batches[name] = [[(e.rollout_id.partition(".s")[2], e.reward) for e in b.entries] for b in claimed]
        weights[name] = [each.weights_digest for each in versions]
    assert [len(batch) for batch in batches["one"]] == [4 * 8, 4 * 8]
    assert batches["one"] == batches["two"]
    assert weights["one"] == weights["two"]
    assert len(set(weights["one"])) > 1
    tasks = {
        name: [[entry.rpartition(".n")[0] for entry, _ in b] for b in found]
        for name, found in batches.items()
    }
    assert tasks["one"] != tasks["other"]
    same, other = (_differences(folder / "one", folder / name) for name in ("two", "other"))
    assert {section for section, _ in same} == {"config"}
    assert all("one" in a and "two" in b for a, b in same.values()), same
    assert other.keys() - same.keys() == {("seed", ""), ("config", "data.seed")}
    assert other["seed", ""] == (7, 8)
