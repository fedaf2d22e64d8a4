"""The released agentlightning 0.3.0, in an environment of its own, as a client of our store."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import REPOSITORY, agentlightning_python
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run_peer(script: str, *arguments: str, within: float = 120) -> str:
    """Runs a script with the released package; returns its last line."""
    command = [agentlightning_python(), "-W", "ignore", str(REPOSITORY / "tests/doors" / script), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=within, check=False)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return answer.stdout.strip().splitlines()[-1]


def test_everything_that_its_client_can_say(tmp_path: Path) -> None:
    """By name, as an unchanged program finds a store at its default address."""
    port = free_port()
    with StoreProcess(tmp_path / "store.db", "--http-port", str(port)):
        assert json.loads(run_peer("peer_client.py", f"http://localhost:{port}")) == {"passed": 4}


def test_its_trainer_and_its_runners_work_on_our_store(tmp_path: Path) -> None:
    port = free_port()
    with StoreProcess(tmp_path / "store.db", "--http-port", str(port)):
        assert json.loads(run_peer("peer_trainer.py", f"http://127.0.0.1:{port}")) == {"trained": 6}
