"""Faults on purpose are off unless asked for, and a rule that cannot be read stops the start."""

from __future__ import annotations

import pytest

from agl_grpc.store.storage import failpoints
from agl_grpc.store.storage.engine import DatabaseError


def test_off_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    assert failpoints.from_environment() is None


def test_a_rule_fires_with_its_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setenv(failpoints.VARIABLE, "before_commit:delay(3)@0.5;after_commit:delay(7);seed=1")
    monkeypatch.setattr(failpoints.time, "sleep", slept.append)
    found = failpoints.from_environment()
    assert found is not None
    for _ in range(200):
        found.hit("before_commit")
    assert set(slept) == {0.003}
    assert 60 < len(slept) < 140
    found.hit("after_commit")
    assert slept[-1] == 0.007


@pytest.mark.parametrize("rule", ["nowhere:kill", "before_commit:explode", "before_commit", "seed=x"])
def test_an_unreadable_rule_is_named(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"after_commit:kill@0.1;{rule}")
    with pytest.raises(DatabaseError, match=f"cannot read '{rule}'; write PLACE:ACTION"):
        failpoints.from_environment()
