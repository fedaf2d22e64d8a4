"""The nemesis over leases."""

from __future__ import annotations

import random

import pytest

from tests.chaos import leases


@pytest.mark.parametrize(
    "count", [1_500, pytest.param(10_000, marks=[pytest.mark.e2e, pytest.mark.timeout(600)])]
)
async def test_no_two_live_leases_and_every_late_write_refused(count: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    counts = await leases.run(seed, count)
    assert counts.leases >= count
    assert counts.refused > count / 10
    assert counts.lost_answers > count / 50
    assert counts.reconnects > 0
