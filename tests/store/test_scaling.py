"""The simulated store of `benchmarks.scaling` writes as the real one does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import simpy

from benchmarks.scaling import Store

WORK, SYNC = 0.001, 0.003


def acknowledged(store: Store, env: simpy.Environment, *begins: float) -> list[float]:
    """When requests that begin at these moments are acknowledged."""
    moments: list[float] = []

    def ask(begin: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(begin)
        yield store.do(WORK)
        moments.append(env.now)

    for begin in begins:
        env.process(ask(begin))
    env.run(until=1.0)
    return moments


def test_a_server_with_its_own_file_works_while_a_commit_goes_to_the_disk_and_is_one_ahead() -> None:
    env = simpy.Environment()
    store = Store(env, SYNC)
    # The 2nd comes during the 1st one's work, the 3rd and 4th while the 2nd one's commit waits for the disk.
    found = acknowledged(store, env, 0.0, 0.0005, 0.0025, 0.0030)
    assert found == pytest.approx([0.004, 0.007, 0.010, 0.010])


def test_a_server_with_nothing_else_to_do_syncs_by_itself() -> None:
    env = simpy.Environment()
    store = Store(env, SYNC)
    # What comes meanwhile begins when the sync is done, and goes into one commit.
    assert acknowledged(store, env, 0.0, 0.002, 0.003) == pytest.approx([0.004, 0.009, 0.009])


def test_servers_over_one_database_wait_for_the_disk_within_their_turn() -> None:
    env = simpy.Environment()
    lock = simpy.Resource(env)
    one, two = Store(env, SYNC, lock), Store(env, SYNC, lock)
    env.process(_later(env, two))
    assert acknowledged(one, env, 0.0, 0.0005) == pytest.approx([0.004, 0.012])
    assert two.latencies == pytest.approx([0.008 - 0.0002])


def _later(env: simpy.Environment, store: Store) -> Generator[simpy.Event, Any, None]:
    yield env.timeout(0.0002)
    yield store.do(WORK)
