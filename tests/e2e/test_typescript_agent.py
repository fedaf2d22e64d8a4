"""An agent in TypeScript, trained: the algorithm runs here, the workers are Node's."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agl_grpc import StoreClient
from tests.conformance.languages import LANGUAGES, ROOT
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

STEPS = 20
LIMIT_SECONDS = 1400.0


def test_a_typescript_agent_is_trained(tmp_path: Path) -> None:
    LANGUAGES["typescript"].make()
    port = free_port()
    paths = [str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])]
    roles = {"AGL_CURRENT_ROLE": "algorithm", "AGL_SERVER_PORT": str(port)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **roles}
    command = [sys.executable, "-m", "examples.calculator.train", "--run", "ts", "--run-dir", str(tmp_path)]
    example = LANGUAGES["typescript"].folder / "dist" / "examples" / "calculator.js"
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            ["node", str(example), f"127.0.0.1:{port}", "ts", "64"], stdout=log, stderr=log
        )
    try:
        done = subprocess.run(
            [*command, "--steps", str(STEPS), "--quick", "--save-every", str(STEPS)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert worker.poll() is None, (tmp_path / "worker.log").read_text()
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    assert done.returncode == 0, done.stdout[-6000:] + (tmp_path / "worker.log").read_text()[-3000:]
    found = re.search(r"accuracy, sampled .*?: ([\d.]+)% before, ([\d.]+)% after", done.stdout)
    assert found is not None, done.stdout[-6000:]
    before, after = float(found[1]), float(found[2])
    assert after > before + 15, done.stdout[-6000:]
    with StoreProcess(tmp_path / "ts" / "agl.db") as store:
        workers = asyncio.run(_workers(store.address))
    assert workers == {"typescript"}


async def _workers(address: str) -> set[str]:
    """The languages of the workers that did all the work."""
    async with StoreClient(address) as client:
        return {
            "typescript" if "-ts-" in worker.worker_id else worker.worker_id
            for worker in await client.query_workers()
        }
