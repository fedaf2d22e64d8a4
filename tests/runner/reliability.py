"""The full fleets: `python -m tests.runner.reliability` writes what it found to `benchmarks/reliability/`.

Exits 1 when a promise was broken. `--scale 0.1` makes everything ten times smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_grpc.client import StoreClient
from benchmarks import machine
from tests.runner.fleet import Fleet, killed_workers, rolling_restart
from tests.runner.simulated import simulated_workers
from tests.support.store_process import StoreProcess

RESULTS = Path(__file__).parents[2] / "benchmarks" / "reliability"


async def run(scale: float, seed: int, folder: Path) -> dict[str, Any]:
    """All scenarios, each on a store of its own."""
    found: dict[str, Any] = {}
    size = max(2, round(10 * scale))
    for name in ("simulated workers", "killed workers", "rolling restart"):
        print(f"{name} …", flush=True)
        part = folder / name.replace(" ", "-")
        part.mkdir()
        with StoreProcess(part / "store.db") as store:
            async with StoreClient(store.address, run_id="fleet") as client:
                await client.create_run("fleet")
                match name:
                    case "simulated workers":
                        workers, rollouts = round(1000 * scale), round(10_000 * scale)
                        found[name] = await simulated_workers(store, client, workers, rollouts)
                    case "killed workers":
                        fleet = Fleet(machines=size, workers=2, rollouts=round(2000 * scale))
                        found[name] = await killed_workers(store, client, fleet, part, seed)
                    case "rolling restart":
                        fleet = Fleet(machines=max(2, size // 2), workers=2, rollouts=round(2000 * scale))
                        found[name] = await rolling_restart(store, client, fleet, part, seed)
        print(json.dumps(found[name]), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.runner.reliability", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size; 1 = all")
    parser.add_argument("--seed", type=int, default=None, help="of everything random; default: a new one")
    options = parser.parse_args(argv)
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(run(options.scale, seed, Path(folder)))
    except AssertionError as error:
        print(f"error: with seed {seed}: {error}", file=sys.stderr)
        return 1
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    RESULTS.mkdir(exist_ok=True)
    body = {"measured": stamp, "machine": machine.describe(), "scale": options.scale, "seed": seed} | found
    path = RESULTS / f"workers-{stamp}.json"
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(f"written: benchmarks/reliability/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
