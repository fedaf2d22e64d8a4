"""`agl-grpc vllm serve` as a process: what ends it, and how quickly."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.interceptor.engine import engine_command
from tests.support.environments import REPOSITORY, engine_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_engine_that_still_loads_ends_at_once(tiny_model: Path, tmp_path: Path, number: int) -> None:
    log = tmp_path / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            engine_command(tiny_model, "127.0.0.1:9", tmp_path, port=1),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=engine_environment(),
            cwd=REPOSITORY,
            start_new_session=True,
        )
    children: list[psutil.Process] = []
    try:
        until = time.monotonic() + 200
        # The engine core speaks for the first time in the middle of the loading.
        while b"(EngineCore pid=" not in log.read_bytes():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        asked = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == -number
        assert time.monotonic() - asked < 5
        assert psutil.wait_procs(children, timeout=5)[1] == []
    finally:
        for left in [process, *children]:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(10)


def test_the_last_line_says_why_the_engine_core_did_not_start(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM's own says that its core failed, and to look for the cause above."""
    empty = tmp_path / "no weights"
    shutil.copytree(tiny_model, empty, ignore=shutil.ignore_patterns("*.safetensors*"))
    done = subprocess.run(
        engine_command(empty, "127.0.0.1:9", tmp_path, port=1),
        capture_output=True,
        text=True,
        env=engine_environment(),
        cwd=REPOSITORY,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("engine stopped: engine core: RuntimeError: Cannot find any model weights"), said
