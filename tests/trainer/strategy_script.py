"""A user's program: an agent that no import can find, an algorithm, and a strategy named on the command line.

`python -m tests.trainer.strategy_script WHAT STRATEGY FOLDER`, where STRATEGY is `shm`, `spawn` or `fork`.
With AGL_TEST_STORE the run is one of the store that runs there.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from agl_grpc import LitAgent, StoreClient, Trainer, rollout
from agl_grpc.algorithm import algo
from agl_grpc.client import RetryPolicy

FACTOR = 10.0
PATIENCE_SECONDS = 2.0


def made_here(factor: float) -> LitAgent[Any]:
    """An agent inside a function: nothing can import it."""

    @rollout
    def scale(task: dict[str, Any], resources: Any) -> float:
        if task.get("die") and not Path(task["die"]).exists():
            Path(task["die"]).touch()
            os._exit(9)
        return float(task["number"]) * factor

    return scale


@rollout
def endless(task: Any, resources: Any) -> None:
    """Never comes back by itself."""
    print("agent is running", flush=True)
    threading.Event().wait()


@algo
async def summing(store: StoreClient, train_dataset: Any) -> float:
    """Has every task done once and answers the sum of the rewards."""
    ids = [(await store.enqueue_rollout(task)).rollout_id for task in train_dataset]
    await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    return sum(reward.value for reward in await store.query_rewards(ids))


@algo
async def failing(store: StoreClient) -> None:
    """Breaks while an agent is at work."""
    await _agent_is_running(store)
    raise RuntimeError("this algorithm is broken")


def blocking(store: StoreClient) -> None:
    """A plain function that waits for ever, with an agent at work."""
    import asyncio

    async def begin() -> None:
        async with StoreClient(store.target, run_id=store.run_id) as own:
            await _agent_is_running(own)

    asyncio.run(begin())
    print("algorithm is running", flush=True)
    threading.Event().wait()


async def _agent_is_running(store: StoreClient) -> None:
    rollout = await store.enqueue_rollout({"number": 1})
    async for change in store.watch_rollouts(include_existing=True):
        if any(item.rollout_id == rollout.rollout_id and item.latest_attempt_id for item in change.items):
            return


def main(what: str, strategy: str, folder: str) -> None:
    """Trains, and prints what came of it."""
    quick = {"graceful_timeout": 1.0, "terminate_timeout": 4.0}
    chosen: Any = {"type": "cs", "start_method": strategy, **quick}
    if strategy == "shm":
        chosen = {"type": "shm", "graceful_delay": 1.0, "join_timeout": 4.0}
    common: dict[str, Any] = {"strategy": chosen, "run_name": "run", "run_dir": folder}
    common["runner"] = {"drain_seconds": 1.0, "concurrency": 2}
    if elsewhere := os.environ.get("AGL_TEST_STORE"):
        common["store"] = StoreClient(elsewhere, retry=RetryPolicy(timeout=PATIENCE_SECONDS))
    if what == "sum":
        tasks = [{"number": 1}, {"number": 2, "die": f"{folder}/died" if strategy == "fork" else ""}]
        print(Trainer(algorithm=summing, **common).fit(made_here(FACTOR), tasks).value)
    elif what == "fail":
        Trainer(algorithm=failing, **common).fit(endless)
    elif what == "apart":
        del common["strategy"]
        role = os.environ["AGL_CURRENT_ROLE"]
        common["run_dir"] = f"{folder}/{role}"
        agent = "tests.trainer.agents:halver"
        print(Trainer(algorithm=summing, **common).fit(agent, [{"number": 4}, {"number": 6}]).value)
    else:
        Trainer(algorithm=algo(blocking), **common).fit(endless)


if __name__ == "__main__":
    main(*sys.argv[1:])
