"""Writes recorded_tiny.jsonl: the metrics of a real run of the tiny model with verl, as the store has them.

    python -m tests.diagnosis.recorded FOLDER STEPS TARGET

It runs `agl-grpc learner` on a real store with the engine of tests/learner/contract_engine.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.client import StoreClient
from tests.learner import test_store_e2e as run
from tests.support.environments import learner_python
from tests.support.store_process import StoreProcess

_MODEL = "import sys; from pathlib import Path; from tests.learner.trainer_script import make_model; "


def main(folder: Path, steps: int, target: Path) -> None:
    """Trains, and writes a line for each step."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [learner_python(), "-c", f"{_MODEL}make_model(Path(sys.argv[1]))", str(folder / "model")],
        env=run.environment(),
        check=True,
    )
    (folder / "tasks.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(48)))
    with StoreProcess(folder / "store.db") as store:
        with run.served(store, folder, "tiny"):
            learner = run.Learner(run._configure(folder, steps), store.address)
            assert learner.finish() == 0, "\n".join(learner.lines[-40:])
        items = asyncio.run(_read(store.address))
    target.write_bytes(b"".join(orjson.dumps(item, option=orjson.OPT_APPEND_NEWLINE) for item in items))


async def _read(address: str) -> list[dict[str, Any]]:
    async with StoreClient(address) as client:
        return [
            {"step": step.step, **step.metrics}
            async for _, found in client.watch_training_run("tr_e2e")
            for step in found
        ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
