"""The main job, short: interrupted by Ctrl-C, resumed, its store killed, trained to the end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc import StoreClient
from agl_grpc.model.enums import AttemptStatus, RolloutMode
from agl_grpc.trainer.sweep import MARK
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STEPS = 16
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
        command += ["--run-dir", str(folder.parent), "--steps", str(STEPS), "--quick", "--save-every", "4"]
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
        first.wait_for_step(5)
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


async def test_every_acknowledged_call_is_stored_exactly_once(trained: Trained, tmp_path: Path) -> None:
    counters = trained.manifest["sessions"][-1]["captured"]
    assert counters["delivered"] == counters["captured"] > 0
    assert (counters["rejected"], counters["undurable"], counters["spool_waiting"]) == (0, 0, 0)
    calls: Counter[tuple[str, str, bytes]] = Counter()
    of_last_engine = 0
    with StoreProcess(trained.folder / "agl.db") as store:
        async with StoreClient(store.address, run_id=trained.folder.name) as client:
            ids = [rollout.rollout_id for rollout in await client.query_rollouts()]
            async for span in client.export_spans(rollout_ids=ids, model_calls_only=True, sealed_only=False):
                calls[span.rollout_id, span.attempt_id, span.span.span_id] += 1
                of_last_engine += span.span.model_call.engine_id == counters["engine_id"]
    assert max(calls.values()) == 1
    assert of_last_engine == counters["delivered"]


async def test_every_rollout_ended_once(trained: Trained) -> None:
    with StoreProcess(trained.folder / "agl.db") as store:
        async with StoreClient(store.address, run_id=trained.folder.name) as client:
            rollouts = await client.query_rollouts()
            attempts: Counter[str] = Counter()
            for rollout in rollouts:
                ended = await client.query_attempts(rollout.rollout_id)
                attempts[rollout.rollout_id] = sum(item.status is AttemptStatus.SUCCEEDED for item in ended)
                assert rollout.status.is_terminal, f"{rollout.rollout_id} is {rollout.status}"
                expected = int(rollout.status.value == "succeeded")
                assert attempts[rollout.rollout_id] == expected, rollout.rollout_id
            trained_ones = [item for item in rollouts if item.mode is RolloutMode.TRAIN]
    assert sum(attempts[item.rollout_id] for item in trained_ones) >= STEPS * 128
