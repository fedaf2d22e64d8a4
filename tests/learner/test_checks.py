"""The proofs made on every batch: each mix-up that matters is caught."""

from __future__ import annotations

import numpy as np
import pytest

from agl_grpc.learner.batch.checks import (
    LogprobLimits,
    LogprobRow,
    SealedRow,
    account,
    check_logprobs,
    check_seals,
)
from agl_grpc.learner.errors import FidelityError
from agl_grpc.learner.rollouts.groups import BatchEntry, FinishedRollout

VERSION = 7
LIMITS = LogprobLimits()


def _row(
    key: str, sampled: list[float], recomputed: list[float], versions: list[int] | None = None
) -> LogprobRow:
    length = len(sampled)
    return LogprobRow(
        key,
        np.array(sampled, dtype=np.float32),
        np.array(recomputed, dtype=np.float32),
        np.ones(length, dtype=np.int64),
        np.array(versions or [VERSION] * length, dtype=np.int64),
    )


def test_equal_logprobs_pass_and_are_counted() -> None:
    metrics = check_logprobs([_row("g_0_0", [-1.0, -2.0], [-1.0, -2.0])], version=VERSION, limits=LIMITS)
    assert metrics["check/logprob_tokens_compared"] == 2
    assert metrics["check/logprob_max_difference"] == 0


def test_one_wrong_token_among_many_is_caught_by_the_maximum() -> None:
    sampled = [-1.0] * 50_000
    with pytest.raises(FidelityError, match="row g_0_0"):
        check_logprobs([_row("g_0_0", sampled, [*sampled[:-1], -1.001])], version=VERSION, limits=LIMITS)


def test_many_small_differences_are_caught_by_the_mean() -> None:
    row = _row("g_0_0", [-1.0] * 100, [-1.00005] * 100)
    with pytest.raises(FidelityError, match="mean"):
        check_logprobs([row], version=VERSION, limits=LIMITS)


def test_differences_of_both_signs_do_not_cancel() -> None:
    row = _row("g_0_0", [-1.0, -1.0], [-0.5, -1.5])
    with pytest.raises(FidelityError):
        check_logprobs([row], version=VERSION, limits=LIMITS)


def test_tokens_of_older_versions_are_counted_not_compared() -> None:
    row = _row("g_0_0", [-1.0, -9.0], [-1.0, -2.0], [VERSION, VERSION - 1])
    metrics = check_logprobs([row], version=VERSION, limits=LIMITS)
    assert metrics["check/logprob_tokens_of_older_versions"] == 1
    assert metrics["check/logprob_tokens_compared"] == 1


def test_a_version_that_does_not_exist_yet_is_refused() -> None:
    row = _row("g_0_0", [-1.0], [-1.0], [VERSION + 1])
    with pytest.raises(FidelityError, match="policy version 8"):
        check_logprobs([row], version=VERSION, limits=LIMITS)


def test_masked_tokens_may_differ() -> None:
    row = LogprobRow(
        "g_0_0",
        np.array([0.0, -1.0], dtype=np.float32),
        np.array([-7.0, -1.0], dtype=np.float32),
        np.array([0, 1]),
        np.array([-1, VERSION]),
    )
    assert check_logprobs([row], version=VERSION, limits=LIMITS)["check/logprob_tokens_compared"] == 1


def test_a_logprob_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(FidelityError, match="finite"):
        check_logprobs([_row("g_0_0", [float("nan")], [-1.0])], version=VERSION, limits=LIMITS)


ENTRIES = [
    BatchEntry("a.n0", "a", 1.0),
    BatchEntry("a.n1", "a", 0.0),
    BatchEntry("b.n0", "b", 0.5),
    BatchEntry("b.n1", "b", 0.25),
]
ROWS = [
    SealedRow("a_0_0", "a.n0", "a", 1.0),
    SealedRow("a_1_0", "a.n1", "a", 0.0),
    SealedRow("b_0_0", "b.n0", "b", 0.5),
    SealedRow("b_1_0", "b.n1", "b", 0.25),
]


def test_rows_that_agree_with_the_batch_pass() -> None:
    assert check_seals(ROWS, ENTRIES)["check/sealed_rows"] == 4


def test_swapped_rewards_are_caught() -> None:
    first, second, *rest = ROWS
    swapped = [
        SealedRow(first.key, first.rollout_id, first.group_id, second.reward),
        SealedRow(second.key, second.rollout_id, second.group_id, first.reward),
        *rest,
    ]
    with pytest.raises(FidelityError, match=r"reward 0\.0"):
        check_seals(swapped, ENTRIES)


def test_swapped_groups_are_caught() -> None:
    other = {"a": "b", "b": "a"}
    swapped = [SealedRow(row.key, row.rollout_id, other[row.group_id], row.reward) for row in ROWS]
    with pytest.raises(FidelityError, match="group 'b'"):
        check_seals(swapped, ENTRIES)


def test_a_row_under_the_key_of_another_rollout_is_caught() -> None:
    moved = [SealedRow("a_1_0", "a.n0", "a", 1.0), *ROWS[1:]]
    with pytest.raises(FidelityError, match="carries rollout"):
        check_seals(moved, ENTRIES)


def test_a_rollout_without_a_row_and_a_row_without_a_rollout_are_caught() -> None:
    with pytest.raises(FidelityError, match=r"b\.n1 is in the batch but has no row"):
        check_seals(ROWS[:-1], ENTRIES)
    with pytest.raises(FidelityError, match="not in the batch"):
        check_seals(ROWS, ENTRIES[:-1])


def test_tokens_are_accounted_for_and_a_lost_one_is_caught() -> None:
    rollout = FinishedRollout("a.n0", "a", 1.0, (), captured=10, observed=3, dropped={"length": 2})
    metrics = account([rollout], {"a.n0": 5})
    assert metrics["tokens/captured"] == 10
    assert metrics["tokens/trained"] + metrics["tokens/observed"] + metrics["tokens/dropped"] == 10
    with pytest.raises(FidelityError, match="not accounted for"):
        account([rollout], {"a.n0": 4})
