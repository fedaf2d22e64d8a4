"""A store for the suite, and a client for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agl_grpc.client import StoreClient
from tests.support.store_process import StoreProcess


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """One store for all tests that leave it standing; each uses a run of its own."""
    with StoreProcess(tmp_path_factory.mktemp("store") / "store.db") as process:
        yield process


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    """The test's own run."""
    name: str = request.node.name
    return name.replace("[", "-").replace("]", "")[:100]


@pytest.fixture
async def client(store: StoreProcess, run_id: str) -> AsyncIterator[StoreClient]:
    """A client of the suite's store, on the test's run."""
    async with StoreClient(store.address, run_id=run_id) as opened:
        await opened.create_run(run_id)
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where agents leave notes."""
    return tmp_path
