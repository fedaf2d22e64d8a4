"""Small fleets under fire; `make reliability` runs the full ones."""

from __future__ import annotations

import random
from pathlib import Path

from agl_grpc.client import StoreClient
from tests.runner.fleet import Fleet, killed_workers, rolling_restart
from tests.runner.simulated import simulated_workers
from tests.support.store_process import StoreProcess


def _seed() -> int:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


async def test_killed_workers_lose_nothing(store: StoreProcess, client: StoreClient, folder: Path) -> None:
    # More slack than promised: the suite shares its machine with itself.
    fleet = Fleet(machines=3, workers=1, rollouts=120, lease_seconds=1.0, slack_seconds=5.0)
    report = await killed_workers(store, client, fleet, folder, _seed())
    assert report["workers killed"] == 2
    assert report["leases lost"] > 0


async def test_a_rolling_restart_fails_nothing(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store.db") as store:
        async with StoreClient(store.address, run_id="rolling") as client:
            await client.create_run("rolling")
            fleet = Fleet(machines=2, workers=1, rollouts=80)
            await rolling_restart(store, client, fleet, tmp_path, _seed())


async def test_many_workers_on_one_store(store: StoreProcess, client: StoreClient) -> None:
    await simulated_workers(store, client, workers=200, rollouts=400)
