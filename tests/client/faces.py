"""The three faces of the client, all as coroutines, so that one suite runs on each of them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from agl_grpc.client import StoreClient, SyncStoreClient
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.in_process import InProcessStore

FACES = ("async", "sync", "in-process")

_END = object()


class Threaded:
    """A `SyncStoreClient` whose blocking methods run in threads, awaited here as `StoreClient`'s are."""

    def __init__(self, client: SyncStoreClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if inspect.iscoroutinefunction(getattr(StoreClient, name)):
            return lambda *args, **named: asyncio.to_thread(method, *args, **named)
        return lambda *args, **named: _steps(method(*args, **named))


async def _steps(source: Iterator[Any]) -> AsyncIterator[Any]:
    while (item := await asyncio.to_thread(next, source, _END)) is not _END:
        yield item


class Faces:
    """Makes clients of one face to one store."""

    def __init__(self, face: str, target: Any) -> None:
        self._face = face
        self._target = target
        self._made: list[StoreClient] = []

    def client(self, run_id: str = "default") -> StoreClient:
        """A client; it is closed with the others."""
        if self._face == "sync":
            threaded = Threaded(SyncStoreClient(self._target, run_id=run_id))
            self._made.append(cast(StoreClient, threaded))
        else:
            self._made.append(StoreClient(self._target, run_id=run_id))
        return self._made[-1]

    async def close(self) -> None:
        """Closes all clients."""
        for client in self._made:
            await client.close()


@asynccontextmanager
async def faces(face: str, database: Path | str | None) -> AsyncIterator[Faces]:
    """A store for the length of a `with` block, and clients of one face to it."""
    if face == "in-process":
        async with await InProcessStore.open(database) as inside:
            made = Faces(face, inside)
            yield made
            await made.close()
        return
    server = await StoreServer.start(ServeConfig(port=0, database=database, grace=1.0))
    made = Faces(face, server.address)
    try:
        yield made
    finally:
        await made.close()
        await server.stop()
