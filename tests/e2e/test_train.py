"""The main job, short: interrupted by Ctrl-C, resumed, its store killed, trained to the end.

It is asynchronous: a batch is sampled while the one before is trained.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc import StoreClient
from agl_grpc.learner.lineage import step_of
from agl_grpc.model import Attempt, Rollout
from agl_grpc.model.enums import AttemptStatus, BatchStatus, RolloutMode
from agl_grpc.model.training import Batch
from agl_grpc.trainer.sweep import MARK
from agl_grpc.v1 import span_pb2
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STEPS, SAVE, INTERRUPTED = 16, 4, 5
GROUPS, GROUP_SIZE = 16, 8
AHEAD = 1
PART_SECONDS = 900.0


@dataclass
class Trained:
    """What the two sessions of the run left."""

    folder: Path
    interrupted: str
    finished: str
    interrupted_code: int
    finished_code: int
    left_by_interrupted: list[int]
    left_by_finished: list[int]

    @property
    def manifest(self) -> dict[str, Any]:
        loaded: dict[str, Any] = orjson.loads((self.folder / "manifest.json").read_bytes())
        return loaded


class TrainProcess:
    """`python -m examples.calculator.train`, as `make train` starts it."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        self.folder = folder
        self.log = log
        command = [sys.executable, "-m", "examples.calculator.train", "--run", folder.name]
        command += [
            "--run-dir",
            str(folder.parent),
            "--steps",
            str(STEPS),
            "--quick",
            "--save-every",
            str(SAVE),
        ]
        command += ["--ahead", str(AHEAD)]
        paths = [str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, what: str, holds: Callable[[], object]) -> None:
        def probe() -> bool:
            code = self.process.poll()
            assert code is None or holds(), f"ended with {code} before {what}:\n{self.output()[-6000:]}"
            return bool(holds())

        asyncio.run(eventually(probe, within=PART_SECONDS, what=what))

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: re.search(rf"step {step}/", self.output()))


def marked_anywhere() -> set[int]:
    """Processes that a trainer started, as far as they run now."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}=".encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def store_pid(folder: Path) -> int:
    """The store's process as its log names it last."""
    return int(re.findall(r"process (\d+)$", (folder / "logs" / "store.log").read_text(), re.MULTILINE)[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Train, press Ctrl-C after the first checkpoint, resume, kill the store, and let it finish."""
    folder = tmp_path_factory.mktemp("runs") / "calculator"
    before = marked_anywhere()
    first = TrainProcess(folder, folder.parent / "first.log", "--seed", "1")
    second: TrainProcess | None = None
    try:
        first.wait_for_step(INTERRUPTED)
        first.process.send_signal(signal.SIGINT)
        code = first.process.wait(180)
        left = sorted(marked_anywhere() - before)
        second = TrainProcess(folder, folder.parent / "second.log", "--seed", "1", "--resume")
        second.wait_for_step(7)
        os.kill(store_pid(folder), signal.SIGKILL)
        second_code = second.process.wait(PART_SECONDS)
        yield Trained(
            folder,
            first.output(),
            second.output(),
            code,
            second_code,
            left,
            sorted(marked_anywhere() - before),
        )
    finally:
        for process in filter(None, (first, second)):
            if process.process.poll() is None:
                process.process.terminate()
                process.process.wait(120)


def test_ctrl_c_ends_everything_and_says_how_to_go_on(trained: Trained) -> None:
    assert trained.interrupted_code == 130, trained.interrupted
    assert "--resume" in trained.interrupted.splitlines()[-1]
    assert trained.left_by_interrupted == []


def test_the_resumed_run_goes_on_after_its_checkpoint_and_survives_its_store(trained: Trained) -> None:
    assert trained.finished_code == 0, trained.finished
    steps = [int(step) for step in re.findall(r"step (\d+)/", trained.finished)]
    assert steps[-1] == STEPS
    assert "store was killed by SIGKILL; starting it again" in trained.finished
    assert trained.left_by_finished == []


def test_the_reward_rises(trained: Trained) -> None:
    texts = trained.interrupted + trained.finished
    rewards = {
        int(step): float(value) for step, value in re.findall(r"step (\d+)/\d+  reward ([\d.]+)", texts)
    }
    assert sorted(rewards) == list(range(1, STEPS + 1))
    first, last = (sum(rewards[step] for step in steps) / 4 for steps in (range(1, 5), range(13, 17)))
    print(f"mean reward of the first four steps {first:.3f}, of the last four {last:.3f}")
    assert last > first + 0.1


def test_the_trained_checkpoint_answers_better_by_transformers_alone(trained: Trained) -> None:
    # The run script itself fails when it does not.
    assert re.search(
        r"transformers, greedy, 200 held-out questions: [\d.]+% before, [\d.]+% after", trained.finished
    )


def test_picture_metrics_and_manifest_are_there(trained: Trained) -> None:
    assert (trained.folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list((trained.folder / "tensorboard").rglob("events.*"))
    manifest = trained.manifest
    assert len(manifest["sessions"]) == 2
    assert manifest["sessions"][0]["versions"]["learner"]["verl"] == "0.9.1"
    assert {"before", "after"} <= manifest["validation"].keys()


@dataclass
class Stored:
    """What the store of the run holds after its end."""

    rollouts: Sequence[Rollout]
    attempts: Mapping[str, Sequence[Attempt]]
    calls: list[span_pb2.StoredSpan]
    batches: list[Batch]
    steps_of_versions: dict[int, int]
    metrics: dict[int, Mapping[str, float]]

    @property
    def committed(self) -> list[Batch]:
        """The trained batches, in the order of their steps."""
        return sorted(
            (batch for batch in self.batches if batch.status is BatchStatus.COMMITTED),
            key=lambda batch: batch.step,
        )

    def calls_of(self, batch: Batch) -> list[span_pb2.StoredSpan]:
        """The model calls of a batch's rollouts."""
        trained = {(entry.rollout_id, entry.attempt_id) for entry in batch.entries}
        return [call for call in self.calls if (call.rollout_id, call.attempt_id) in trained]


@pytest.fixture(scope="module")
def stored(trained: Trained) -> Stored:
    return asyncio.run(_read(trained))


async def _read(trained: Trained) -> Stored:
    with StoreProcess(trained.folder / "agl.db") as store:
        async with StoreClient(store.address, run_id=trained.folder.name) as client:
            rollouts = await client.query_rollouts()
            ids = [rollout.rollout_id for rollout in rollouts]
            exported = client.export_spans(rollout_ids=ids, model_calls_only=True, sealed_only=False)
            versions = await client.query_policy_versions("calculator")
            training = str(trained.manifest["training_run_id"])
            metrics: dict[int, Mapping[str, float]] = {}
            async for _, steps in client.watch_training_run(training):
                metrics.update({step.step: step.metrics for step in steps})
            return Stored(
                rollouts=rollouts,
                attempts={each: await client.query_attempts(each) for each in ids},
                calls=[span async for span in exported],
                batches=await client.query_batches(training),
                steps_of_versions={0: 0} | {each.policy_version: step_of(each) for each in versions},
                metrics=metrics,
            )


def test_every_acknowledged_call_is_stored_exactly_once(trained: Trained, stored: Stored) -> None:
    counters = trained.manifest["sessions"][-1]["captured"]
    assert counters["delivered"] + counters["spooled"] == counters["captured"] > 0
    assert (counters["rejected"], counters["undurable"], counters["spool_waiting"]) == (0, 0, 0)
    calls = Counter((call.rollout_id, call.attempt_id, call.span.span_id) for call in stored.calls)
    assert max(calls.values()) == 1
    of_last_engine = [
        call for call in stored.calls if call.span.model_call.engine_id == counters["engine_id"]
    ]
    assert len(of_last_engine) == counters["captured"]


def test_the_killed_store_cost_no_rollout_its_calls(stored: Stored) -> None:
    """What began before its attempt had ended well was there before that was sealed."""
    ends = {
        one.attempt_id: one.end_time or 0.0
        for attempts in stored.attempts.values()
        for one in attempts
        if one.status is AttemptStatus.SUCCEEDED
    }
    late = [
        (call.rollout_id, call.span.span_id.hex())
        for call in stored.calls
        if call.late and call.span.start_time_unix_nano < ends.get(call.attempt_id, 0.0) * 1e9
    ]
    assert late == []


def test_every_rollout_ended_once(stored: Stored) -> None:
    succeeded: dict[str, int] = {}
    for rollout in stored.rollouts:
        ended = stored.attempts[rollout.rollout_id]
        succeeded[rollout.rollout_id] = sum(item.status is AttemptStatus.SUCCEEDED for item in ended)
        assert rollout.status.is_terminal, f"{rollout.rollout_id} is {rollout.status}"
        expected = int(rollout.status.value == "succeeded")
        assert succeeded[rollout.rollout_id] == expected, rollout.rollout_id
    trained_ones = [item for item in stored.rollouts if item.mode is RolloutMode.TRAIN]
    assert sum(succeeded[item.rollout_id] for item in trained_ones) >= STEPS * GROUPS * GROUP_SIZE


def test_groups_are_trained_together_and_once(stored: Stored) -> None:
    """Who is missing in a group is counted with the reason: the store was killed while rollouts ran."""
    assert [batch.step for batch in stored.committed] == list(range(1, STEPS + 1))
    sizes = [Counter(entry.group_id for entry in batch.entries) for batch in stored.committed]
    assert [len(groups) for groups in sizes] == [GROUPS] * STEPS
    assert len(set().union(*sizes)) == STEPS * GROUPS
    assert all(2 <= size <= GROUP_SIZE for groups in sizes for size in groups.values())
    rollouts = [entry.rollout_id for batch in stored.committed for entry in batch.entries]
    assert len(set(rollouts)) == len(rollouts)
    excluded = sum(
        count
        for metrics in stored.metrics.values()
        for name, count in metrics.items()
        if name.startswith("rollouts/excluded/")
    )
    assert STEPS * GROUPS * GROUP_SIZE - len(rollouts) <= excluded


def test_no_token_is_older_than_the_bound(stored: Stored) -> None:
    """By the policy version that the engine noted with each token, and by the histogram of each step."""
    ahead = 0
    choices = [choice for call in stored.calls for choice in call.span.model_call.choices]
    print(f"answers under two policy versions: {sum(len(choice.policy_runs) > 1 for choice in choices)}")
    for batch in stored.committed:
        ages: Counter[int] = Counter()
        for call in stored.calls_of(batch):
            for choice in call.span.model_call.choices:
                for run in choice.policy_runs:
                    age = batch.step - 1 - stored.steps_of_versions[run.policy_version]
                    ages[age] += run.end - run.start
        assert set(ages) <= set(range(AHEAD + 1)), f"step {batch.step}: {ages}"
        told = stored.metrics[batch.step]
        histogram = {
            int(name.rpartition("/")[2]): count
            for name, count in told.items()
            if name.startswith("staleness/tokens/")
        }
        # Answers that were cut by their length are sampled and not trained.
        assert all(count <= ages[age] for age, count in histogram.items()), f"step {batch.step}: {ages}"
        assert sum(histogram.values()) == told["tokens/trained"]
        ahead += ages[AHEAD]
    assert ahead > 0, "no batch was sampled ahead"


def test_rollouts_asked_for_ahead_survive_a_restart_of_the_trainer(stored: Stored) -> None:
    """The first step after the restart trains what the first engine sampled before the checkpoint."""
    (carried,) = (batch for batch in stored.committed if batch.step == SAVE + 1)
    assert carried.trainer_epoch == 2
    claimed_before = [batch for batch in stored.batches if batch.status is BatchStatus.RELEASED]
    assert carried.content_hash in {batch.content_hash for batch in claimed_before}
    calls = stored.calls_of(carried)
    engines = {call.span.model_call.engine_id for call in calls}
    last_engines = {call.span.model_call.engine_id for call in stored.calls_of(stored.committed[-1])}
    assert len(engines) == 1
    assert not engines & last_engines


def test_waiting_of_engine_and_optimiser_is_reported(stored: Stored) -> None:
    assert sorted(stored.metrics) == list(range(1, STEPS + 1))
    for step, metrics in stored.metrics.items():
        assert 0 <= metrics["idle/optimiser_seconds"] <= metrics["timing_s/step"], step
        assert metrics["idle/engine_seconds"] >= 0, step
    seconds, engine, optimiser = (
        sum(metrics[name] for metrics in stored.metrics.values())
        for name in ("timing_s/step", "idle/engine_seconds", "idle/optimiser_seconds")
    )
    print(f"{seconds:.0f} s of steps: engine idle {engine:.0f} s, optimiser idle {optimiser:.0f} s")
