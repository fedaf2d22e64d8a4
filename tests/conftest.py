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
