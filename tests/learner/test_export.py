"""Checkpoints: listed, checked and exported by the command; damaged and foreign ones refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import orjson
import pytest
from agl_grpc_cli import checkpoint as command
from typer.testing import CliRunner

from agl_grpc.learner.checkpoints.checkpoint import check_fits, resume_keys
from agl_grpc.learner.checkpoints.export import find_checkpoint
from agl_grpc.learner.checkpoints.integrity import stamp
from agl_grpc.learner.checkpoints.model_folder import stored_dtype
from agl_grpc.learner.errors import ConfigError

SHAPE = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def write_model(folder: Path, dtype: str = "F32", **changes: object) -> Path:
    """A model folder with one tensor and verl's wrong dtype in its configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(orjson.dumps({**SHAPE, "dtype": "bfloat16", **changes}))
    header = json.dumps({"weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    for step in (2, 10):
        folder = tmp_path / "run" / "checkpoints" / f"global_step_{step}"
        write_model(folder / "actor" / "huggingface")
        (folder / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"shard")
        state = {"step": step, "prompts_fetched": 8, "batch_ids": [f"b{step}"]}
        (folder / "learner.json").write_bytes(orjson.dumps(state))
        stamp(folder)
    return tmp_path / "run"


def invoke(*arguments: object) -> str:
    """What the command prints, or its one line of error."""
    result = CliRunner().invoke(command.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"error: {result.exception}"
    return result.output


def test_checkpoints_are_listed_checked_and_exported(run_folder: Path, tmp_path: Path) -> None:
    listed = json.loads(invoke("list", run_folder, "--json"))
    assert [(each["checkpoint"], each["step"], each["batches"]) for each in listed] == [
        ("global_step_2", 2, ["b2"]),
        ("global_step_10", 10, ["b10"]),
    ]
    assert invoke("verify", run_folder) == "global_step_10: 4 files are what was saved\n"
    target = tmp_path / "exported"
    report = json.loads(invoke("export", run_folder, target, "--json"))
    assert (report["checkpoint"], report["step"], report["dtype"]) == ("global_step_10", 10, "float32")
    assert stored_dtype(target) == "float32"
    # An engine would load the weights rounded if the configuration said so.
    assert orjson.loads((target / "config.json").read_bytes())["dtype"] == "float32"
    assert "is not empty" in invoke("export", run_folder, target)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_flipped_byte_blocks_resumption_and_export(run_folder: Path, tmp_path: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    assert resume_keys(checkpoints, "global_step_10")["resume_mode"] == "resume_path"
    shard = checkpoints / "global_step_10" / "actor" / "model_world_size_1_rank_0.pt"
    data = bytearray(shard.read_bytes())
    data[2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is damaged: actor/model_world_size_1_rank_0\.pt"):
        resume_keys(checkpoints, "global_step_10")
    assert "is damaged" in invoke("verify", run_folder)
    assert "is damaged" in invoke("export", run_folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    shard.unlink()
    with pytest.raises(ConfigError, match="is not whole"):
        resume_keys(checkpoints, "global_step_10")
    # The one before is as good as ever.
    assert resume_keys(checkpoints, "global_step_2")["resume_mode"] == "resume_path"


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"vocab_size": 128}, 1, r"another model's: its vocab_size is 64, that of .* is 128"),
        ({"model_type": "llama"}, 1, "its model_type is 'qwen2'"),
        ({}, 2, "was saved by 1 ranks, and this run has 2"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    run_folder: Path, tmp_path: Path, changes: dict[str, object], ranks: int, message: str
) -> None:
    checkpoint = find_checkpoint(run_folder)
    check_fits(checkpoint, write_model(tmp_path / "same"), 1)
    with pytest.raises(ConfigError, match=message) as caught:
        check_fits(checkpoint, write_model(tmp_path / "other", **changes), ranks)
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    assert "holds no checkpoint of the learner" in invoke("list", tmp_path)
    assert "holds no checkpoint of the learner" in invoke("export", tmp_path, tmp_path / "exported")
    for name in ("solver", "planner"):
        (tmp_path / "several" / "models" / name / "checkpoints").mkdir(parents=True)
    named = invoke("list", tmp_path / "several")
    assert "is a run of several models: name one, " in named
    assert named.index("models/planner or ") < named.index("models/solver")
