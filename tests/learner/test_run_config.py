"""The learner's configuration file: what is wrong is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc.algorithm import VERL
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import from_mapping, load


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    (tmp_path / "tasks.jsonl").write_text("{}\n")
    return {
        "model": {"path": str(tmp_path / "model"), "name": "tiny"},
        "train_tasks": str(tmp_path / "tasks.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }


def test_defaults_are_filled_in(valid: dict[str, Any]) -> None:
    config = from_mapping(valid)
    assert config.run_id == "default"
    assert config.checks.logprob_max == 1e-4
    assert config.engines.count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": 1}, "unknown key 'modle'"),
        ({"engines": {"number": 2}}, r"unknown key 'engines\.number'"),
        ({"engines": {"count": "two"}}, r"'engines\.count' must be int"),
        ({"engines": 3}, "'engines' must be a mapping"),
        ({"engines": {"hybrid": True, "backend": "nccl"}}, "engines: backend nccl cannot be had with hybrid"),
        ({"samples": {"truncated": "maybe"}}, "samples: 'maybe' is not a valid Truncated"),
        ({"samples": {"discount": 2}}, "samples: discount 2 must be from 0 to 1"),
        ({"device": "tpu"}, "'device' must be auto, cpu or cuda"),
        ({"sft": {"epochs": 0}}, "sft: epochs must be 1 or more"),
        ({"train_tasks": "nowhere.jsonl"}, r"task file nowhere\.jsonl does not exist"),
        ({"model": {"path": "nowhere", "name": "x"}}, "model folder nowhere does not exist"),
        ({"model": {"path": "nowhere"}}, r"lacks 'model\.name'"),
        ({"follows": "t", "curriculum": {"enabled": True}}, "a curriculum is not possible where several"),
        (
            {"followers": ["solver"], "verl": {"algorithm.filter_groups.enable": True}},
            r"algorithm\.filter_groups is not possible where several models are trained",
        ),
    ],
)
def test_mistakes_are_named(valid: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping({**valid, **change})
    assert "\n" not in str(caught.value)


def test_files_are_read_and_broken_ones_named(tmp_path: Path, valid: dict[str, Any]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(orjson.dumps(valid))
    assert load(str(path)).model.name == "tiny"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        load(str(tmp_path / "other.json"))


def test_what_verl_writes_down_the_learner_reads(valid: dict[str, Any], tmp_path: Path) -> None:
    algorithm = VERL(
        {"actor_rollout_ref": {"model": {"path": valid["model"]["path"]}}},
        visible_devices="4,5",
        ray_address="head:6379",
        engines={"receivers": 2},
        checks={"logprob_max": 0.5},
        deadlines={"compute": 7},
    )
    path = algorithm.write_run(
        tmp_path / "run", run_id="r", training_run_id="t", train_dataset=[{"n": 1}], val_dataset=None
    )
    config = load(str(path))
    assert (config.visible_devices, config.ray_address) == ("4,5", "head:6379")
    assert (config.engines.receivers, config.engines.count) == (2, 1)
    assert (config.checks.logprob_max, config.deadlines.compute) == (0.5, 7)
    with pytest.raises(ConfigError, match=r"unknown key 'engines\.tensor_parallel'"):
        VERL(algorithm.config, engines={"tensor_parallel": 2})
