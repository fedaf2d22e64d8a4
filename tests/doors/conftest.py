"""A store with its doors open, and a client of HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.verify.check import check


@pytest.fixture
async def server(database: Path | str | None) -> AsyncIterator[StoreServer]:
    """A server on each back end; whatever a test does, every invariant of its database holds at the end."""
    server = await StoreServer.start(ServeConfig(port=0, http_port=0, database=database, grace=1.0))
    try:
        yield server
        if not server.store.hub.closed:
            report = await server.store.read(check)
            assert report.sound, report.broken
    finally:
        await server.stop()


@pytest.fixture
async def memory() -> AsyncIterator[StoreServer]:
    """A throw-away server."""
    server = await StoreServer.start(ServeConfig(port=0, http_port=0, database=None, grace=1.0))
    try:
        yield server
        if not server.store.hub.closed:
            report = await server.store.read(check)
            assert report.sound, report.broken
    finally:
        await server.stop()


@pytest.fixture
async def http(memory: StoreServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a throw-away server's HTTP door."""
    async with httpx.AsyncClient(base_url=memory.url, timeout=10) as client:
        yield client
