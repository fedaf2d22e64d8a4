"""The learner's line to the store: a client in a thread of its own, used by the trainer's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from agl_grpc.client import RetryPolicy, StoreClient

T = TypeVar("T")


class StoreLink:
    """One I/O thread with one event loop, which owns the client and every stream.

    Args:
        address: ``host:port`` of the store.
        run_id: the run whose rollouts are trained.
        patience: how long calls are retried and streams reopened while the store is away, in seconds.
    """

    def __init__(self, address: str, run_id: str, *, patience: float = 120.0) -> None:
        self.address = address
        self.retry = RetryPolicy(timeout=patience)
        self.client = StoreClient(address, run_id=run_id, retry=self.retry)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="learner-io", daemon=True)
        self._thread.start()
        self._tasks: set[Future[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the I/O thread and waits for its result; it is cancelled when the wait is."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine on the I/O thread; it is cancelled by ``close``."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._tasks.add(future)
        future.add_done_callback(self._tasks.discard)
        return future

    def close(self) -> None:
        """Ends everything that was started, closes the channel and stops the thread."""
        for task in list(self._tasks):
            task.cancel()
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()
