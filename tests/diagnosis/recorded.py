"""Writes recorded_tiny.jsonl: the metrics of a real run of the tiny model with verl, as the store has them.

    python -m tests.diagnosis.recorded FOLDER STEPS TARGET

It runs `agl-grpc learner` on a real store with the engine of tests/learner/contract_engine.py.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.client import StoreClient
from tests.learner.runs import Learner, configure, make_folder, served
from tests.support.store_process import StoreProcess


def main(folder: Path, steps: int, target: Path) -> None:
    """Trains, and writes a line for each step."""
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(folder)
    with StoreProcess(folder / "store.db") as store:
        with served(store, folder, "tiny"):
            learner = Learner(configure(folder, steps), store.address)
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
