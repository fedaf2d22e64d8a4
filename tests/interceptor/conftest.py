"""One real engine for all tests of this folder, before a store that does as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.interceptor.engine import Engine, engine
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.torch_client import TorchClient


@pytest.fixture(scope="session")
def torch_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchClient]:
    """Torch and transformers, in the engine environment."""
    with TorchClient(tmp_path_factory.mktemp("torch") / "helper.log") as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, torch_client: TorchClient) -> Path:
    """Folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch_client.call("make_model", folder=str(folder))
    return folder


@pytest.fixture(scope="session")
def store() -> Iterator[ScriptedStore]:
    """The store of the session's engine."""
    with ScriptedStore() as scripted:
        yield scripted


@pytest.fixture(scope="session")
def running(
    tiny_model: Path, store: ScriptedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """The session's engine."""
    with engine(tiny_model, store.address, tmp_path_factory.mktemp("engine")) as started:
        yield started


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A plain HTTP client with a long timeout."""
    with httpx.Client(timeout=120) as client:
        yield client
