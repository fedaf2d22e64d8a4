"""A real store server in this process, and a client to it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agl_grpc.client import StoreClient
from agl_grpc.store.door.app import ServeConfig, StoreServer
from tests.client.faces import FACES, Faces, faces


@pytest.fixture
async def store(database: Path | str | None) -> AsyncIterator[StoreServer]:
    server = await StoreServer.start(ServeConfig(port=0, database=database, grace=1.0))
    yield server
    await server.stop()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
async def client(store: StoreServer) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.address) as made:
        yield made


@pytest.fixture(params=FACES)
async def any_face(request: pytest.FixtureRequest, database: Path | str | None) -> AsyncIterator[Faces]:
    """Clients of each face in turn, to a store on each back end."""
    async with faces(request.param, database) as made:
        yield made
