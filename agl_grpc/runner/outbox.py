"""Finished attempts on their way to the store: kept until it has taken them, however long it is away."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from agl_grpc.client import RetryPolicy, StoreClient, StoreError
from agl_grpc.client.errors import error_from_item
from agl_grpc.runner.retry import until_answered
from agl_grpc.v1 import runner_service_pb2 as pb

MAX_BATCH = 1000
MAX_BATCH_BYTES = 8 * 1024 * 1024

# Short, because the loop around it has no end: a store that is away is noticed and said soon.
CALL = RetryPolicy(timeout=10.0)

Settled = Callable[[pb.Completion, StoreError | None], Awaitable[None]]


class Outbox:
    """Sends completions in batches: whatever has gathered while the last call was under way.

    One call keeps its request id over all its tries, so that a lost answer completes nothing twice.
    `settled` is told of every completion: taken (None), or refused with a reason.
    """

    def __init__(self, client: StoreClient, worker_id: str, settled: Settled) -> None:
        self._client = client
        self._worker_id = worker_id
        self._settled = settled
        self._waiting: deque[pb.Completion] = deque()
        self._wake = asyncio.Event()

    def put(self, completion: pb.Completion) -> None:
        """Accepts the end of an attempt; never blocks."""
        self._waiting.append(completion)
        self._wake.set()

    async def run(self) -> None:
        """Delivers until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._deliver(self._take())

    def _take(self) -> list[pb.Completion]:
        batch = [self._waiting.popleft()]
        size = batch[0].ByteSize()
        while self._waiting and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].ByteSize()
        return batch

    async def _deliver(self, batch: list[pb.Completion]) -> None:
        request = pb.CompleteAttemptsRequest(worker_id=self._worker_id, completions=batch)

        def complete() -> Awaitable[pb.CompleteAttemptsResponse]:
            return self._client.call(self._client.bound.runner.CompleteAttempts, request, retry=CALL)

        try:
            response = await until_answered(complete, f"{len(batch)} finished attempts")
        except StoreError as error:
            await self._divide(batch, error)
            return
        for completion, result in zip(batch, response.results, strict=True):
            await self._settled(completion, error_from_item(result.error) if result.HasField("error") else None)

    async def _divide(self, batch: list[pb.Completion], error: StoreError) -> None:
        # A request that is refused as a whole: find the one that is to blame, deliver the others.
        if len(batch) == 1:
            await self._settled(batch[0], error)
            return
        for completion in batch:
            await self._deliver([completion])
