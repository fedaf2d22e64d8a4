"""Both ends of a lease stream within one process: no network between worker and store."""

from __future__ import annotations

import asyncio
from typing import Any

from agl_grpc.store.door.call import Call
from agl_grpc.store.handlers.lease_stream import LeaseStreamHandlers
from agl_grpc.v1 import runner_service_pb2


class Pipe:
    """What the store's handler takes for a bidirectional stream."""

    def __init__(self) -> None:
        self.to_store: asyncio.Queue[Any] = asyncio.Queue()
        self.to_worker: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        """The store reads; None = the worker has said all."""
        return await self.to_store.get()

    async def write(self, answer: Any) -> None:
        """The store writes."""
        await self.to_worker.put(answer)


async def reconcile(
    streams: LeaseStreamHandlers, opening: runner_service_pb2.LeaseStreamOpen
) -> runner_service_pb2.LeaseStreamOpened:
    """Opens a lease stream, hears what became of the leases that it names, and hangs up."""
    pipe = Pipe()
    pipe.to_store.put_nowait(runner_service_pb2.StreamLeasesRequest(open=opening))
    serving = asyncio.ensure_future(
        streams.stream_leases(pipe, Call(method="StreamLeases"))  # type: ignore[arg-type] # as a BidiStream
    )
    opened: runner_service_pb2.LeaseStreamOpened = (await pipe.to_worker.get()).opened
    pipe.to_store.put_nowait(None)
    await serving
    return opened
