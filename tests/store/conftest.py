"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.store.rig import Rig, running


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A server on a throw-away database, with a clock that the test moves."""
    async with running(None) as rig:
        yield rig
