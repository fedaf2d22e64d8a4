"""Credit by turn, and what a batch's rows say of the conversations they come from."""

from __future__ import annotations

import statistics

import pytest

from agl_grpc.learner.batch.checks import row_starts
from agl_grpc.learner.credit.turn_credit import advantages_by_rollout, normalised_returns
from agl_grpc.learner.rollouts.groups import FinishedRollout


def test_with_final_rewards_alone_it_is_grpo_however_many_turns_a_rollout_has() -> None:
    rewards, turns = [1.0, 0.0, 0.25, 1.0], [1, 5, 2, 3]
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    found = normalised_returns([[reward] * count for reward, count in zip(rewards, turns, strict=True)])
    for row, reward, count in zip(found, rewards, turns, strict=True):
        assert row == pytest.approx([(reward - mean) / (deviation + 1e-6)] * count)
    plain = normalised_returns([[reward] for reward in rewards], by_deviation=False)
    assert [row[0] for row in plain] == pytest.approx([reward - mean for reward in rewards])


def test_an_answer_that_did_better_than_the_group_is_credited_and_another_of_its_rollout_is_not() -> None:
    good, bad = normalised_returns([[2.0, 0.0], [1.0, 1.0]])
    assert good[0] > 0 > good[1]
    assert bad == pytest.approx([0.0, 0.0])


def test_groups_do_not_see_each_other_and_one_rollout_alone_teaches_nothing() -> None:
    groups = {"a": "g", "b": "g", "c": "h"}
    found = advantages_by_rollout(groups, {"a": [1.0], "b": [0.0, 0.0], "c": [7.0, 5.0]})
    assert found["c"] == [0.0, 0.0]
    assert found["a"][0] == pytest.approx(-found["b"][0])
    assert advantages_by_rollout({"a": "g", "b": "g"}, {"a": [3.0], "b": []}) == {"a": [0.0], "b": []}


def test_equal_returns_throughout_give_no_advantage() -> None:
    assert normalised_returns([[0.5, 0.5], [0.5]]) == [[0.0, 0.0], [0.0]]


def test_why_rows_began_is_a_metric_and_breaks_are_told_from_branches() -> None:
    rollouts = [
        FinishedRollout("a", "g", 1.0, (), row_starts={"first": 1, "branch": 2, "template": 1}),
        FinishedRollout("b", "g", 0.0, (), row_starts={"first": 1, "retokenised": 3}, unplaced_rewards=2),
    ]
    assert row_starts(rollouts) == {
        "rows/start/first": 2.0,
        "rows/start/branch": 2.0,
        "rows/start/template": 1.0,
        "rows/start/retokenised": 3.0,
        "rows/breaks": 4.0,
        "reward/unplaced": 2.0,
    }
