"""The full fleets, for `make reliability`: one program for each promise, on a store of its own."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agl_grpc.client import StoreClient
from tests.runner.fleet import Fleet, killed_workers, rolling_restart, store_away
from tests.runner.simulated import simulated_workers
from tests.support.store_process import StoreProcess

Scenario = Callable[[StoreProcess, StoreClient, Path], Awaitable[dict[str, Any]]]

ROLLOUTS_OF_A_MACHINE = 200
SECONDS_AWAY = 60.0


def prove_simulated(count: int, seed: int) -> dict[str, Any]:
    """So many simulated workers, ten rollouts for each."""
    return _on_a_store(lambda store, client, _: simulated_workers(store, client, count, 10 * count))


def prove_kills(count: int, seed: int) -> dict[str, Any]:
    """So many rollouts while a tenth of the workers and a whole machine are killed."""
    fleet = Fleet(machines=max(3, count // ROLLOUTS_OF_A_MACHINE), workers=2, rollouts=count)
    return _on_a_store(lambda store, client, folder: killed_workers(store, client, fleet, folder, seed))


def prove_restart(count: int, seed: int) -> dict[str, Any]:
    """So many rollouts while every machine, and the store, are restarted one after the other."""
    fleet = Fleet(machines=max(2, count // ROLLOUTS_OF_A_MACHINE // 2), workers=2, rollouts=count)
    return _on_a_store(lambda store, client, folder: rolling_restart(store, client, fleet, folder, seed))


def prove_store_away(count: int, seed: int) -> dict[str, Any]:
    """So many rollouts, and a store that is away for a minute while each worker holds what has finished."""
    fleet = Fleet(machines=3, workers=2, rollouts=count, concurrency=8, lease_seconds=10.0)
    return _on_a_store(lambda store, client, folder: store_away(store, client, fleet, folder, SECONDS_AWAY))


def _on_a_store(scenario: Scenario) -> dict[str, Any]:
    async def run(folder: Path) -> dict[str, Any]:
        with StoreProcess(folder / "store.db") as store:
            async with StoreClient(store.address, run_id="fleet") as client:
                await client.create_run("fleet")
                return await scenario(store, client, folder)

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))
