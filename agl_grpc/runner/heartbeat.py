"""A worker's signs of life: what it does, why it idles, and a snapshot of its machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from agl_grpc.client import RetryPolicy, StoreClient, StoreError
from agl_grpc.model import WorkerStatus
from agl_grpc.model.enums import number_of
from agl_grpc.model.value import to_key_values
from agl_grpc.runner.machine import MachineSnapshot
from agl_grpc.v1 import runner_service_pb2 as pb

log = logging.getLogger(__name__)


class WorkerView(Protocol):
    """What a worker shows of itself."""

    @property
    def worker_id(self) -> str:
        """Its id."""

    @property
    def leaving(self) -> bool:
        """Whether it takes nothing new any more."""

    @property
    def idle_reason(self) -> str:
        """Why it idles; empty = it does not."""


class Heartbeat:
    """Beats for one worker each `seconds`, and at once after `soon`."""

    def __init__(self, client: StoreClient, worker: WorkerView, seconds: float) -> None:
        self._client = client
        self._worker = worker
        self._seconds = seconds
        self._machine = MachineSnapshot()
        self._changed = asyncio.Event()

    def soon(self) -> None:
        """Asks for a heartbeat now, because what it says has changed."""
        self._changed.set()

    async def run(self) -> None:
        """Beats until cancelled; a store that is away is tried again at the next turn."""
        while True:
            self._changed.clear()
            try:
                await self.beat()
            except StoreError as error:
                log.debug("no heartbeat: %s", error)
            try:
                async with asyncio.timeout(self._seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def beat(self) -> None:
        """Sends one heartbeat.

        Raises:
            StoreError: the store did not take it.
        """
        request = pb.HeartbeatRequest(
            worker_id=self._worker.worker_id,
            stats=to_key_values(self._machine.read(), "stats"),
            idle_reason=self._worker.idle_reason,
            # Idle and busy the store sees by itself, from the leases.
            status=number_of(WorkerStatus.DRAINING if self._worker.leaving else None),
        )
        policy = RetryPolicy(timeout=self._seconds)
        await self._client.call(self._client.bound.runner.Heartbeat, request, retry=policy)
