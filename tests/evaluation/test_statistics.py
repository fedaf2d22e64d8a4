"""The estimators, against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_grpc.evaluation import EvaluationError, bootstrap, majority, paired_test, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(
    answers: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    draws = list(itertools.combinations(answers, k))
    share = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(len(answers), sum(answers), k) == pytest.approx(share)


def test_pass_at_k_holds_for_many_answers() -> None:
    wanted = 1 - math.comb(900, 100) / math.comb(1000, 100)
    assert pass_at_k(1000, 100, 100) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 5), "pass@5 needs 5 or more answers for each task, and there are 4"),
        ((4, 2, 0), "k must be 1 or more"),
        ((4, 5, 2), "5 of 4 answers cannot be right"),
    ],
)
def test_what_pass_at_k_cannot_say_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        pass_at_k(*arguments)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 1)), max_size=8))
def test_the_majority_is_the_most_frequent_answer(given_answers: list[tuple[str | None, int]]) -> None:
    voters = [(answer, reward) for answer, reward in given_answers if answer is not None]
    found = majority([a for a, _ in given_answers], [float(r) for _, r in given_answers])
    if not voters:
        assert found is None
        return
    names = [answer for answer, _ in voters]
    winners = {name for name in names if names.count(name) == max(map(names.count, names))}
    means = [sum(r for a, r in voters if a == winner) / names.count(winner) for winner in sorted(winners)]
    assert found == pytest.approx(sum(means) / len(means))


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.75]
    means = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
    found = bootstrap(values, seed=3)
    assert found is not None
    assert found.low == pytest.approx(means[int(0.025 * len(means))], abs=0.03)
    assert found.high == pytest.approx(means[int(0.975 * len(means))], abs=0.03)
    assert bootstrap(values, seed=3) == found
    assert bootstrap([1.0]) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7))
def test_the_p_value_is_the_share_of_all_sign_flips(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    differences = [b - a for a, b in pairs]
    flips = itertools.product((-1, 1), repeat=len(pairs))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    share = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    test = paired_test(first, second, resamples=50)
    assert test.p_value == pytest.approx(share)
    assert test.difference == pytest.approx(sum(differences) / len(pairs))
    assert (test.better, test.worse) == (sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def test_many_tasks_are_tested_at_random_and_alike_each_time() -> None:
    first = [0.0] * 40
    better = [1.0] * 30 + [0.0] * 10
    test = paired_test(first, better, seed=1)
    assert test.significant
    assert 0 < test.p_value < 0.001
    assert test == paired_test(first, better, seed=1)
    mixed = [1.0, -1.0] * 20
    assert paired_test(first, mixed, seed=1).p_value > 0.9


def test_nothing_in_common_cannot_be_compared() -> None:
    with pytest.raises(EvaluationError, match="nothing to compare"):
        paired_test([], [])
