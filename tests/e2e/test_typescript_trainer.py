"""Training runs from another language: started, followed, stopped, their results fetched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.languages import LANGUAGES, ROOT
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CONFIG = {"agent": "tests.trainer.agents:halver", "strategy": "shm"}
TELLING = {"algorithm": "tests.trainer.agents:telling", "train_dataset": "tests.trainer.agents:TASKS"}


def test_a_run_is_started_followed_and_stopped_in_typescript(tmp_path: Path) -> None:
    LANGUAGES["typescript"].make()
    example = str(LANGUAGES["typescript"].folder / "dist" / "examples" / "training.js")
    with StoreProcess(tmp_path / "store.db") as store:
        command = [sys.executable, "-m", "agl_grpc_cli", "train", "worker", "--store", store.address]
        with (tmp_path / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [*command, "--run-dir", str(tmp_path)], stdout=log, stderr=log, cwd=ROOT
            )
        try:
            good = ["node", example, store.address, "good", json.dumps({**CONFIG, **TELLING})]
            done = subprocess.run(good, capture_output=True, text=True, timeout=60, check=True)
            lines = done.stdout.splitlines()
            assert lines.index("three tasks") < lines.index("step 1  reward/mean 2")
            assert lines[-2:] == ["good-training succeeded", '{"sum":6}']

            endless = json.dumps({**CONFIG, "algorithm": "tests.trainer.agents:waiting"})
            long = subprocess.Popen(
                ["node", example, store.address, "long", endless], stdout=subprocess.PIPE, text=True
            )
            with long:
                assert long.stdout is not None
                assert long.stdout.readline() == "step 1  reward/mean 0\n", "it has begun"
                long.send_signal(signal.SIGINT)
                told = long.stdout.read().splitlines()
            assert told[-2:] == ["long-training stopped", "null"]
            assert worker.poll() is None, (tmp_path / "worker.log").read_text()
        finally:
            worker.terminate()
            worker.wait(60)
