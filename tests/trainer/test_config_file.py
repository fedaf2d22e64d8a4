"""`agl-grpc train --config FILE`: the same as the Python API, by import paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agl_grpc.trainer.config_file import fit_from_file
from agl_grpc.trainer.errors import TrainerError


def test_a_file_trains_and_overrides_come_first(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"number": 2}\n\n{"number": 4}\n')
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
agent = "tests.trainer.agents:halver"
algorithm = "tests.trainer.agents:summing"
train_dataset = "{tasks}"
run_name = "from-file"
run_dir = "{tmp_path}"
strategy = "shm"
[runner]
concurrency = 2
"""
    )
    result = fit_from_file(config, run_name="named")
    assert result.value == 3.0
    assert result.folder.path == tmp_path / "named"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({}, "names no agent"),
        ({"agent": "no.such:agent"}, "there is no module 'no'"),
        ({"agent": "tests.trainer.agents:halver", "colour": 1}, "colour"),
        (
            {"agent": "tests.trainer.agents:halver", "train_dataset": "gone.jsonl"},
            "gone.jsonl cannot be read",
        ),
        ({"agent": "tests.trainer.agents:halver", "train_dataset": 5}, "is a int"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(content: dict[str, object], part: str, tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(content))
    with pytest.raises(TrainerError, match=part):
        fit_from_file(config)


def test_the_command_fails_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "agl_grpc_cli", "train", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {config} is not valid")
    assert len(done.stderr.splitlines()) == 1
