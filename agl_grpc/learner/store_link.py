"""The learner's line to the store: one I/O thread with one event loop that owns every grpc.aio object."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import grpc.aio

from agl_grpc.learner.errors import DeadlineError, LearnerError
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceAsyncStub, StoreServiceStub
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceAsyncStub, TrainerServiceStub

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
# The store is away or restarting: the same request id may be sent again.
_RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
_CALL_SECONDS = 60.0


def new_request_id() -> str:
    """An idempotency key: kept across the retries of one logical call."""
    return uuid.uuid4().hex


class StoreLink:
    """Channel and stubs of the store, used from any thread.

    Args:
        address: ``host:port`` of the store.
        patience: how long a call is retried while the store does not answer, in seconds.
    """

    def __init__(self, address: str, *, patience: float = 120.0) -> None:
        self.address = address
        self._patience = patience
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="learner-io", daemon=True)
        self._thread.start()
        self._tasks: set[Future[Any]] = set()
        self._channel, self.store, self.trainer = self.run(self._open())

    async def _open(self) -> tuple[grpc.aio.Channel, StoreServiceAsyncStub, TrainerServiceAsyncStub]:
        channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        # The generated stubs serve both kinds of channel; the typed names exist for the checker alone.
        store: Any = StoreServiceStub(channel)
        trainer: Any = TrainerServiceStub(channel)
        return channel, store, trainer

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs a coroutine on the I/O thread and waits for its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine on the I/O thread; it is cancelled by ``close``."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._tasks.add(future)
        future.add_done_callback(self._tasks.discard)
        return future

    async def call(self, method: Callable[..., Awaitable[T]], request: Any, *, what: str) -> T:
        """One unary call, repeated with the same request while the store is away.

        Raises:
            DeadlineError: the store did not come back in time.
            LearnerError: the store refused; the message holds its words.
        """
        deadline = time.monotonic() + self._patience
        pause = 0.1
        while True:
            try:
                return await method(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED:
                    raise LearnerError(
                        f"{what}: the store answered {error.code().name}: {error.details()}"
                    ) from error
                if time.monotonic() + pause > deadline:
                    raise DeadlineError(
                        f"{what}: the store at {self.address} did not answer for {self._patience:g} s "
                        f"({error.code().name}: {error.details()})"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)

    def ask(self, method: Callable[..., Awaitable[T]], request: Any, *, what: str) -> T:
        """``call`` for threads other than the I/O thread."""
        return self.run(self.call(method, request, what=what))

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
        await self._channel.close()
