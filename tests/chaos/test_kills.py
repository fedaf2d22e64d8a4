"""The store killed under load."""

from __future__ import annotations

import random

import pytest

from tests.chaos import kills


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=[pytest.mark.e2e, pytest.mark.timeout(900)])])
async def test_what_was_acknowledged_survives_kill_9_exactly_once(count: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    report = await kills.run(seed, count)
    assert report.repeats.total() > count
    assert report.rollouts > count
    assert report.spans > 10 * count
