"""Training runs that are asked for over the wire: started, followed, stopped, their results fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.runs import app as runs_app
from agl_grpc_cli.train import app
from typer.testing import CliRunner

from agl_grpc.client import SyncStoreClient
from agl_grpc.model import TrainingRun
from tests.support.store_process import StoreProcess

ENDLESS = "tests.trainer.agents:endless"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path / "store.db") as process:
        yield process


class Done(NamedTuple):
    """What a command printed, and the error that it ended with."""

    stdout: str
    error: str


def _train(store: StoreProcess, *arguments: str) -> Done:
    done = CliRunner().invoke(app, arguments, env={"AGL_GRPC_STORE": store.address})
    if done.exception is not None and not isinstance(done.exception, CliError):
        raise done.exception
    return Done(done.stdout, str(done.exception or ""))


def _config(tmp_path: Path, **more: object) -> str:
    data = {
        "agent": "tests.trainer.agents:halver",
        "train_dataset": "tests.trainer.agents:TASKS",
        "strategy": "shm",
        **more,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_run_is_started_worked_on_and_read(store: StoreProcess, tmp_path: Path) -> None:
    config = _config(tmp_path, algorithm="tests.trainer.agents:telling")
    assert _train(store, "start", config, "--run_name", "good").stdout == "good-training\n"
    broken = _config(tmp_path, algorithm="tests.trainer.agents:failing", run_name="bad")
    _train(store, "start", broken)
    for _ in range(2):
        _train(store, "worker", "--once", "--run-dir", str(tmp_path / "runs"))
    shown = _train(store, "watch", "good-training").stdout
    assert "three tasks" in shown
    assert "step 1" in shown
    assert shown.endswith("good-training succeeded\n")
    found = json.loads(_train(store, "show", "good-training").stdout)
    assert found["result"] == {"sum": 6.0}
    assert (tmp_path / "runs" / "good" / "metrics.jsonl").is_file()
    with SyncStoreClient(store.address) as client:
        run = client.get_run_by_id("good")
        assert run is not None
        kept = run.metadata["manifest/good-training"]
    assert kept["datasets"]["train"]["tasks"] == 3
    assert kept["versions"]["user"]["python"]
    compared = CliRunner().invoke(
        runs_app, ["diff", "good-training", "bad-training", "--store", store.address, "--json"]
    )
    sections = {each["section"] for each in json.loads(compared.stdout)["differences"]}
    assert "versions" not in sections
    assert "config" in sections
    assert _train(store, "watch", "bad-training").error == "bad-training failed: this algorithm is broken"
    listed = _train(store, "ls").stdout
    assert [line.split()[2] for line in listed.splitlines()[1:]] == ["succeeded", "failed"]


def test_a_worker_refuses_what_is_wrong_and_stops_when_asked(store: StoreProcess, tmp_path: Path) -> None:
    with SyncStoreClient(store.address) as client:
        client.create_run("wrong")
        wrong = {"agent": "tests.trainer.agents:halver", "algorithm": {"type": "apo", "bem_width": 1}}
        client.create_training_run(
            TrainingRun(training_run_id="wrong", run_id="wrong", algorithm="apo", config=wrong)
        )
    _train(store, "worker", "--once", "--run-dir", str(tmp_path / "runs"))
    assert "did you mean algorithm.beam_width" in _train(store, "watch", "wrong").error
    _train(store, "start", _config(tmp_path, algorithm=ENDLESS, run_name="long", train_dataset=None))
    command = [sys.executable, "-m", "agl_grpc_cli", "train", "worker", "--once", "--store", store.address]
    command += ["--run-dir", str(tmp_path / "runs"), "--worker-id", "w"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _until_epoch(store, 2)
    finally:
        killed.kill()
        killed.wait()
    # The next one under the same id goes on with what the killed one had.
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _until_epoch(store, 3)
        assert _train(store, "stop", "long-training").stdout == "long-training stopping\n"
        worker.wait(60)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 0
    assert _train(store, "watch", "long-training").stdout.endswith("long-training stopped\n")


def _until_epoch(store: StoreProcess, epoch: int) -> None:
    """Returns when a trainer of this epoch has the run: the worker counts once, its trainer once more."""
    with SyncStoreClient(store.address) as client:
        for change in client.watch_training_runs(include_existing=True):
            if any(item.run_id == "long" and item.trainer_epoch == epoch for item in change.items):
                return
