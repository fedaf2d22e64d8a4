"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background makes it ignore Ctrl-C, and so all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "learner/test_store_e2e.py",
    "e2e/test_train.py",
    "learner/test_lives_e2e.py",
    "learner/test_trainer_e2e.py",
    "learner/test_hybrid_e2e.py",
    "e2e/test_several_models.py",
    "learner/test_two_models_e2e.py",
    "e2e/test_typescript_agent.py",
    "clients/test_clients.py",
    "frameworks/test_frameworks.py",
)
"""The end-to-end files that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: with two workers, one that begins last leaves the other idle."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server."""
    server = PostgresServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["memory", "file", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str | None]:
    """Where a store keeps everything: each test runs on each back end."""
    if request.param != "postgres":
        yield tmp_path / "store.db" if request.param == "file" else None
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    with server.lend() as url:
        yield url
