"""The store killed under load."""

from __future__ import annotations

import random

import pytest

from tests.chaos import kills
from tests.support.postgres import PostgresServer


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=[pytest.mark.e2e, pytest.mark.timeout(900)])])
async def test_what_was_acknowledged_survives_kill_9_exactly_once(count: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    report = await kills.run(seed, count)
    assert report.repeats.total() > count
    assert report.rollouts > count
    assert report.spans > 10 * count


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=[pytest.mark.e2e, pytest.mark.timeout(600)])])
async def test_either_of_two_servers_may_be_killed_and_their_database_may_crash(
    count: int, postgres: PostgresServer
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    report = await kills.run(seed, count, postgres.make_database(), servers=2, crash=postgres.restart)
    assert report.rollouts > count
    assert report.spans > 10 * count
