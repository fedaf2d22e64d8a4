"""Every state by every event, cell by cell, against the documentation's tables (R3-R7, R9-R11)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.lifecycle import (
    AttemptEvent,
    Clocks,
    Outcome,
    RolloutEvent,
    Rules,
    assign_attempt,
    assign_rollout,
    backoff,
    fire,
    judge,
    move_attempt,
    move_rollout,
    next_due,
    seal,
)

ATTEMPTS = {
    "preparing": lifecycle.A_PREPARING,
    "running": lifecycle.A_RUNNING,
    "succeeded": lifecycle.A_SUCCEEDED,
    "failed": lifecycle.A_FAILED,
    "timeout": lifecycle.A_TIMEOUT,
    "unresponsive": lifecycle.A_UNRESPONSIVE,
    "cancelled": lifecycle.A_CANCELLED,
}
ROLLOUTS = {
    "queuing": lifecycle.QUEUING,
    "preparing": lifecycle.PREPARING,
    "running": lifecycle.RUNNING,
    "succeeded": lifecycle.SUCCEEDED,
    "failed": lifecycle.FAILED,
    "cancelled": lifecycle.CANCELLED,
    "requeuing": lifecycle.REQUEUING,
}

PAGE = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()


def cells(heading: str) -> list[tuple[str, str, str]]:
    """State, event and cell of the first table below a heading of the documentation."""
    section = PAGE.split(f"## {heading}\n", 1)[1]
    lines = [line for line in section.split("\n\n")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        (row[0], event, cell) for row in rows[2:] for event, cell in zip(rows[0][1:], row[1:], strict=True)
    ]


ATTEMPT_TABLE = cells("Attempts")
ROLLOUT_TABLE = cells("Rollouts")


@pytest.mark.parametrize(("state", "event", "cell"), ATTEMPT_TABLE)
def test_attempt_cell(state: str, event: str, cell: str) -> None:
    status = ATTEMPTS["unresponsive" if state == "revivable" else state]
    move = move_attempt(status, AttemptEvent[event], revivable=state == "revivable")
    expected = {"-": (Outcome.KEPT, status), "✗": (Outcome.REFUSED, status)}.get(cell)
    assert (move.outcome, move.status) == (expected or (Outcome.CHANGED, ATTEMPTS[cell]))


@pytest.mark.parametrize(("state", "event", "cell"), ROLLOUT_TABLE)
def test_rollout_cell(state: str, event: str, cell: str) -> None:
    status = ROLLOUTS[state]
    move = move_rollout(status, RolloutEvent[event])
    expected = {"-": (Outcome.KEPT, status), "✗": (Outcome.REFUSED, status)}.get(cell)
    assert (move.outcome, move.status) == (expected or (Outcome.CHANGED, ROLLOUTS[cell]))


def test_the_tables_are_complete() -> None:
    states = {*ATTEMPTS, "revivable"}
    assert {cell[:2] for cell in ATTEMPT_TABLE} == {(s, e.name) for s in states for e in AttemptEvent}
    assert {cell[:2] for cell in ROLLOUT_TABLE} == {(s, e.name) for s in ROLLOUTS for e in RolloutEvent}
    assert set(ATTEMPTS.values()) == set(lifecycle.ATTEMPT_STATES)
    assert set(ROLLOUTS.values()) == set(lifecycle.ROLLOUT_STATES)


@pytest.mark.parametrize(("before", "wanted"), list(itertools.product(ROLLOUTS, ROLLOUTS)))
def test_a_rollout_set_by_hand(before: str, wanted: str) -> None:
    move = assign_rollout(ROLLOUTS[before], ROLLOUTS[wanted])
    if before == wanted:
        assert move.outcome is Outcome.KEPT
    elif before in ("succeeded", "failed", "cancelled"):
        assert move.outcome is Outcome.REFUSED
        assert move.status == ROLLOUTS[before]
    else:
        assert (move.outcome, move.status) == (Outcome.CHANGED, ROLLOUTS[wanted])


def test_an_attempt_set_by_hand_means_an_event() -> None:
    assert assign_attempt(lifecycle.A_PREPARING) is None
    for name, status in ATTEMPTS.items():
        event = assign_attempt(status)
        if event is not None:
            assert move_attempt(lifecycle.A_PREPARING, event).status == status, name


def rules(**changes: int) -> Rules:
    base = {
        "max_attempts": 3,
        "max_redeliveries": 2,
        "backoff": 1_000_000,
        "ended_attempts": 0,
        "redeliveries": 0,
    }
    mask = sum(lifecycle.retry_bit(status) for status in lifecycle.RETRYABLE)
    return Rules(**{"retry_mask": mask, **base, **changes})


@pytest.mark.parametrize("event", [AttemptEvent.FAIL, AttemptEvent.TIME_OUT, AttemptEvent.FALL_SILENT])
def test_ends_of_its_own_use_up_attempts(event: AttemptEvent) -> None:
    first = judge(rules(), event)
    assert (first.event, first.ended_attempts, first.delay) == (RolloutEvent.RETRY, 1, 1_000_000)
    second = judge(rules(ended_attempts=1), event)
    assert (second.event, second.ended_attempts, second.delay) == (RolloutEvent.RETRY, 2, 2_000_000)
    assert judge(rules(ended_attempts=2), event).event is RolloutEvent.FAIL
    assert judge(rules(retry_mask=0), event).event is RolloutEvent.FAIL


def test_a_lost_lease_uses_up_redeliveries_only() -> None:
    verdict = judge(rules(retry_mask=0, max_attempts=1), AttemptEvent.LOSE_LEASE)
    assert (verdict.event, verdict.ended_attempts, verdict.redeliveries, verdict.delay) == (
        RolloutEvent.RETRY,
        0,
        1,
        0,
    )
    assert judge(rules(redeliveries=2), AttemptEvent.LOSE_LEASE).event is RolloutEvent.FAIL


def test_a_reported_infrastructure_failure_is_redelivered_with_a_wait() -> None:
    verdict = judge(rules(retry_mask=0), AttemptEvent.FAIL, lifecycle.KIND_INFRASTRUCTURE)
    assert (verdict.event, verdict.ended_attempts, verdict.redeliveries) == (RolloutEvent.RETRY, 0, 1)
    assert verdict.delay == 1_000_000
    used_up = judge(rules(redeliveries=2), AttemptEvent.FAIL, lifecycle.KIND_INFRASTRUCTURE)
    assert used_up.event is RolloutEvent.FAIL
    assert judge(rules(retry_mask=0), AttemptEvent.FAIL, lifecycle.KIND_AGENT).event is RolloutEvent.FAIL


def test_a_release_uses_up_nothing() -> None:
    verdict = judge(rules(retry_mask=0, max_redeliveries=0), AttemptEvent.RELEASE)
    assert (verdict.event, verdict.ended_attempts, verdict.redeliveries, verdict.delay) == (
        RolloutEvent.RETRY,
        0,
        0,
        0,
    )


def test_success_and_cancellation_end_the_rollout() -> None:
    assert judge(rules(), AttemptEvent.SUCCEED).event is RolloutEvent.SUCCEED
    assert judge(rules(), AttemptEvent.CANCEL).event is RolloutEvent.CANCEL


def test_the_back_off_doubles_up_to_a_minute() -> None:
    waits = [backoff(1_000_000, count) for count in range(1, 10)]
    assert waits == [second * 1_000_000 for second in (1, 2, 4, 8, 16, 32, 60, 60, 60)]
    assert backoff(1_000_000, 10_000) == 60_000_000
    assert backoff(0, 5) == 0


@pytest.mark.parametrize(
    ("leased", "newest", "rollout", "expected"),
    [
        (False, True, "requeuing", True),
        (False, True, "running", True),
        (True, True, "requeuing", False),
        (False, False, "requeuing", False),
        (False, True, "failed", False),
        (False, True, "cancelled", False),
    ],
)
def test_who_may_come_back(leased: bool, newest: bool, rollout: str, expected: bool) -> None:
    for name, status in ATTEMPTS.items():
        may = lifecycle.is_revivable(status, leased=leased, newest=newest, rollout_status=ROLLOUTS[rollout])
        assert may is (expected and name == "unresponsive")


def test_sealing() -> None:
    common = {"now": 100, "seal_timeout": 60, "returned": 0}
    assert not seal(over=False, open_calls=0, seal_due=None, **common).now
    assert seal(over=True, open_calls=0, seal_due=None, **common) == lifecycle.Seal(True)
    assert seal(over=True, open_calls=2, seal_due=None, **common) == lifecycle.Seal(False, due=160, look=160)
    assert seal(over=True, open_calls=2, seal_due=150, **common) == lifecycle.Seal(False, due=150, look=150)
    assert seal(over=True, open_calls=2, seal_due=100, **common) == lifecycle.Seal(True, incomplete=True)
    assert seal(over=True, open_calls=0, seal_due=150, **common) == lifecycle.Seal(True)


def test_nothing_is_sealed_while_producers_may_still_be_on_their_way_back() -> None:
    grace, timeout, back = lifecycle.RECONNECT_GRACE, 60_000_000, 1_000_000_000
    common = {"over": True, "seal_timeout": timeout, "returned": back}
    now = back + 1_000_000
    held = lifecycle.Seal(False, due=now + timeout, look=back + grace)
    assert seal(now=now, open_calls=0, seal_due=None, **common) == held
    assert not seal(now=back + grace - 1, open_calls=0, seal_due=held.due, **common).now
    assert seal(now=back + grace, open_calls=0, seal_due=held.due, **common) == lifecycle.Seal(True)
    # A call that was announced meanwhile is waited for as long as ever.
    waits = lifecycle.Seal(False, due=held.due, look=held.due)
    assert seal(now=back + grace, open_calls=1, seal_due=held.due, **common) == waits
    # Over long before: the later of both moments, as its producer could not close the call.
    longer = lifecycle.Seal(False, due=back + grace, look=back + grace)
    assert seal(now=now, open_calls=1, seal_due=now, **common) == longer
    # Away again and again: an attempt whose calls are all there waits no longer than for open ones.
    assert seal(now=now, open_calls=0, seal_due=now, **common) == lifecycle.Seal(True)
    # A run that waits less for open calls waits less here too.
    brief = seal(now=now, over=True, open_calls=0, seal_due=None, seal_timeout=1_500_000, returned=back)
    assert brief.look == back + 1_500_000
    assert not seal(now=now, over=False, open_calls=0, seal_due=None, seal_timeout=0, returned=back).now


def test_what_is_due_first() -> None:
    quiet = Clocks(1000, None, None, None, None, None)
    assert next_due(True, quiet) is None
    assert fire(True, quiet, 10**12) is None
    full = Clocks(1000, 1500, timeout=900, unresponsive=300, lease_expire=1700, seal_due=None)
    assert next_due(True, full) == 1700
    assert fire(True, full, 1699) is None
    assert fire(True, full, 1700) is AttemptEvent.LOSE_LEASE
    assert fire(True, full, 1900) is AttemptEvent.TIME_OUT, "the caller's rule comes before the lease"
    silent = Clocks(1000, None, None, 300, None, None)
    assert fire(True, silent, 1299) is None
    assert fire(True, silent, 1300) is AttemptEvent.FALL_SILENT
    over = Clocks(1000, None, 1, 1, None, seal_due=5000)
    assert next_due(False, over) == 5000
    assert fire(False, over, 10**12) is None
