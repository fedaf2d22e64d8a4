"""What ends a `Trainer.fit` early, once one of its training runs has reported a step."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from agl_grpc import StoreClient
from agl_grpc.model import TrainingRun
from agl_grpc.model.enums import TrainingRunStatus
from tests.support.waiting import eventually

_WITHIN_SECONDS = 600.0


async def kill_learner(address: str, run_id: str, training_run_id: str, step: int) -> None:
    """SIGKILL to a training run's learner after a step that none has reported before."""
    async with StoreClient(address, run_id=run_id) as client:
        training = await _reached(client, training_run_id, step)
        os.kill(int((training.trainer_id or "").rpartition(":")[2]), signal.SIGKILL)


async def stop(address: str, run_id: str, training_run_id: str, step: int) -> None:
    """A request to stop, likewise."""
    async with StoreClient(address, run_id=run_id) as client:
        await _reached(client, training_run_id, step)
        await client.stop_training_run(training_run_id)


@contextmanager
def meanwhile(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Does the work beside what is within, in a thread of its own, and raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, work)
        yield
        done.result()


async def _reached(client: StoreClient, training_run_id: str, step: int) -> TrainingRun:
    async def reported() -> bool:
        if await client.get_training_run_by_id(training_run_id) is None:
            return False
        # Of one that has not been taken up again yet the watch ends at once.
        async for _, steps in client.watch_training_run(training_run_id, from_step=step):
            if steps:
                return True
        return False

    await eventually(reported, within=_WITHIN_SECONDS, what=f"step {step} of {training_run_id}")
    training = await client.get_training_run_by_id(training_run_id)
    # Had it ended by itself, nobody would have interrupted it.
    assert training is not None
    assert training.status is TrainingRunStatus.RUNNING
    return training
