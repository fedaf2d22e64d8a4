"""Alarms of any algorithm, and one seed for everything."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agl_grpc import VERL, Trainer
from agl_grpc.algorithm import APO
from agl_grpc.model import TrainingRunStatus
from agl_grpc.trainer import TrainerError
from tests.trainer import agents


def test_an_alarm_is_written_down_and_ends_the_run_where_it_shall(tmp_path: Path) -> None:
    limits = {"window": 2, "raise_after": 1, "stop_on": ["dead_groups"]}
    trainer = Trainer(
        algorithm=agents.collapsing, strategy="shm", run_dir=tmp_path, run_name="dead", alarms=limits
    )
    result = trainer.fit(agents.halver)
    assert result.training_run.status is TrainingRunStatus.STOPPED
    lines = (tmp_path / "dead" / "alarms.jsonl").read_bytes().splitlines()
    (event,) = [orjson.loads(line) for line in lines]
    assert (event["name"], event["raised"], event["step"]) == ("dead_groups", True, 2)


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(TrainerError, match="stop_on names no alarm 'boredom'"):
        Trainer(alarms={"stop_on": ["boredom"]})
    with pytest.raises(TrainerError, match=r"unknown key 'alarms\.windw'"):
        Trainer(alarms={"windw": 3})


def test_one_seed_is_that_of_algorithm_and_validation(tmp_path: Path) -> None:
    verl = VERL({"actor_rollout_ref.model.path": str(tmp_path)})
    trainer = Trainer(algorithm=verl, seed=7, alarms={"window": 9}, run_dir=tmp_path)
    assert (verl.seed, verl.request_seeds, trainer.validation.seed, verl.alarms.window) == (7, True, 7, 9)
    apo = APO(seed=3)
    Trainer(algorithm=apo, run_dir=tmp_path)
    assert apo._seed == 3
    Trainer(algorithm=apo, seed=7, run_dir=tmp_path)
    assert apo._seed == 7
    told = Trainer(algorithm=agents.seeded, seed=5, strategy="shm", run_dir=tmp_path, run_name="s")
    assert told.fit(agents.halver).value == 5
    manifest = orjson.loads((tmp_path / "s" / "manifest.json").read_bytes())
    assert manifest["sessions"][-1]["seed"] == 5
