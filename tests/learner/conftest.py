"""What runs with a real store begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.learner.runs import make_folder
from tests.support.store_process import StoreProcess


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Model and tasks of a run."""
    return make_folder(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    """A store server of the test's own."""
    with StoreProcess(tmp_path / "store.db") as process:
        yield process
