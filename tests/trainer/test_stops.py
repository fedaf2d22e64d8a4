"""However a run ends, it ends cleanly in every strategy: the reason is told, and no process is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually
from tests.trainer.programs import descendants, printed, program

STRATEGIES = ("shm", "spawn", "fork")
# The store, the guard, and the workers' parent with its worker; threads alone need none of them.
PROCESSES = {"shm": 2, "spawn": 4, "fork": 4}
PROCESSES_WITHOUT_STORE = {"shm": 0, "spawn": 3, "fork": 3}


def _stopped(
    folder: Path, what: str, strategy: str, end: Callable[[int], None], store: StoreProcess | None = None
) -> tuple[int, str]:
    """Exit code and output of a program whose agent and algorithm are at work when ``end`` is called."""
    variables = {} if store is None else {"AGL_TEST_STORE": store.address}
    with program(folder, what, strategy, **variables) as process:
        running = eventually(
            lambda: "algorithm is running" in printed(folder, what, strategy), within=60, what="it runs"
        )
        asyncio.run(running)
        started = descendants(process)
        least = (PROCESSES if store is None else PROCESSES_WITHOUT_STORE)[strategy]
        assert len(started) >= least, printed(folder, what, strategy)
        end(process.pid)
        code = process.wait(60)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
    return code, printed(folder, what, strategy)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_signals(tmp_path: Path, strategy: str, number: signal.Signals) -> None:
    code, text = _stopped(tmp_path, "block", strategy, lambda pid: os.kill(pid, number))
    assert code == (-signal.SIGINT if number is signal.SIGINT else 128 + signal.SIGTERM), text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_of_the_algorithm(tmp_path: Path, strategy: str) -> None:
    with program(tmp_path, "fail", strategy) as process:
        assert process.wait(90) == 1
        assert descendants(process) == []
    assert printed(tmp_path, "fail", strategy).strip().endswith("RuntimeError: this algorithm is broken")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_store_elsewhere_that_is_lost_for_ever(tmp_path: Path, strategy: str) -> None:
    with StoreProcess(tmp_path / "store.db") as store:
        code, text = _stopped(tmp_path, "block", strategy, lambda _pid: store.kill(), store)
    assert code == 1
    last = text.splitlines()[-1]
    assert f"TrainerError: the store at {store.address} is lost" in last, text


def test_a_store_elsewhere_outlives_the_run(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store.db") as store:
        code, text = _stopped(tmp_path, "block", "spawn", lambda pid: os.kill(pid, signal.SIGTERM), store)
        assert code == 128 + signal.SIGTERM, text
        assert store.stop() == 0


def test_a_store_of_its_own_that_cannot_come_back(tmp_path: Path) -> None:
    def lose(pid: int) -> None:
        database = tmp_path / "run" / "agl.db"
        (server,) = [
            process
            for process in psutil.Process(pid).children()
            if {"store", "serve"} <= set(process.cmdline())
        ]
        server.suspend()
        with contextlib.suppress(FileNotFoundError):
            database.with_name("agl.db-wal").unlink()
        database.write_bytes(b"no database any more " * 1000)
        server.kill()

    code, text = _stopped(tmp_path, "block", "spawn", lose)
    assert code == 1
    assert "PartDied: store exited with code 1" in text, text
