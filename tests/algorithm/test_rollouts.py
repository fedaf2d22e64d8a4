"""Algorithms see rollouts as they finish; `Baseline` has tasks done; functions report what they came to."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from agl_grpc import NamedResources, StoreClient, Trainer, rollout
from agl_grpc.algorithm import (
    AlgorithmError,
    Baseline,
    Reporter,
    algo,
    cancel_rest,
    primary_rewards,
    run_rollouts,
)
from agl_grpc.model import EnqueueRolloutRequest, TrainingRunStatus
from tests.algorithm.conftest import Bench

TASKS = [{"number": 2}, {"number": 4}, {"number": -1}]


@rollout
def halver(task: dict[str, Any], resources: NamedResources) -> float:
    """Half the number; negative ones fail, `wait` is waited for."""
    if task["number"] < 0:
        raise ValueError("negative numbers cannot be halved")
    if event := task.get("wait"):
        EVENTS[event].wait(20)
    return float(task["number"]) / 2


EVENTS = {"gate": threading.Event()}


async def test_rollouts_come_as_they_finish_and_are_made_once(bench: Bench) -> None:
    EVENTS["gate"].clear()
    requests = [EnqueueRolloutRequest(input=task) for task in ({"number": 2, "wait": "gate"}, {"number": 4})]
    async with bench.ready(Baseline(), halver), StoreClient(bench.address, run_id=bench.run_id) as store:
        seen = []
        async with asyncio.timeout(20):
            async for ended in run_rollouts(store, requests, label="two"):
                seen.append(ended.rollout_id)
                EVENTS["gate"].set()
        assert seen == ["two.1", "two.0"]
        again = [ended async for ended in run_rollouts(store, requests, label="two")]
        assert sorted(await primary_rewards(store, again)) == ["two.0", "two.1"]
        assert len(await store.query_rollouts()) == 2


async def test_what_nobody_waits_for_is_cancelled(bench: Bench) -> None:
    async with StoreClient(bench.address, run_id=bench.run_id) as store:
        await store.create_run(bench.run_id)
        rollouts = run_rollouts(store, [EnqueueRolloutRequest(input=1)], label="late")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(rollouts)
        await cancel_rest(store, "late")
        assert [item.status.value for item in await store.query_rollouts()] == ["cancelled"]


async def test_baseline_has_every_task_done_and_says_how_it_went(bench: Bench) -> None:
    class Names:
        def adapt(self, spans: Any) -> list[str]:
            return [span.name for span in spans]

    baseline = Baseline(n_epochs=2, span_verbosity="key_values")
    baseline.set_adapter(Names())
    async with bench.ready(baseline, halver) as notes:
        result = await baseline.run(TASKS[:2], TASKS[1:])
    assert len(result.rollouts) == 6
    assert sorted(result.rewards.values()) == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert result.mean == pytest.approx(8 / 6)
    assert len(result.adapted) == 6
    assert any("negative numbers cannot be halved" in line for line in notes.lines)
    with pytest.raises(AlgorithmError, match="nothing to do"):
        await baseline.run([], None)


def test_a_plain_function_reports_steps_that_reach_store_files_and_picture(tmp_path: Path) -> None:
    @algo
    def mine(train_dataset: Any, reporter: Reporter) -> int:
        for step, task in enumerate(train_dataset, start=1):
            reporter.step(step, {"reward/mean": task["number"] / 4, "size": step, "odd": float("nan")})
        return len(train_dataset)

    trainer = Trainer(algorithm=mine, strategy="shm", run_name="mine", run_dir=tmp_path)
    result = trainer.fit(halver, TASKS[:2])
    assert result.value == 2
    assert [item.metrics for item in result.history] == [
        {"reward/mean": 0.5, "size": 1.0},
        {"reward/mean": 1.0, "size": 2.0},
    ]
    assert result.training_run is not None
    assert result.training_run.algorithm == "mine"
    assert result.training_run.status is TrainingRunStatus.SUCCEEDED
    assert result.training_run.step == 2
    assert (tmp_path / "mine" / "metrics.jsonl").read_text().count("reward/mean") == 2
    assert list((tmp_path / "mine" / "tensorboard").glob("events.*"))
    for name in ("reward.png", "metrics.png"):
        assert (tmp_path / "mine" / name).read_bytes().startswith(b"\x89PNG")


def test_somebody_else_stops_a_run(tmp_path: Path) -> None:
    @algo
    async def endless(store: StoreClient, reporter: Reporter) -> None:
        reporter.step(1, {"reward/mean": 0.5})
        await store.stop_training_run(f"{store.run_id}-training", "enough")
        await asyncio.get_running_loop().create_future()

    trainer = Trainer(algorithm=endless, strategy="shm", run_name="endless", run_dir=tmp_path)
    result = trainer.fit(halver)
    assert result.training_run is not None
    assert result.training_run.status is TrainingRunStatus.STOPPED
    assert [item.step for item in result.history] == [1]
