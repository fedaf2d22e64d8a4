"""A scripted store and a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.interceptor.front.fake_engine import FakeEngine, fake_engine
from tests.interceptor.scripted_store import ScriptedStore


@pytest.fixture
def scripted() -> Iterator[ScriptedStore]:
    with ScriptedStore() as started:
        yield started


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as started:
        yield started
