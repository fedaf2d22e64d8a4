"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.store.rig import Rig, running


@pytest.fixture
async def rig(database: Path | str | None) -> AsyncIterator[Rig]:
    """A server on each back end, with a clock that the test moves."""
    async with running(database) as rig:
        yield rig
