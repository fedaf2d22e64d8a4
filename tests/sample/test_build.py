"""Rows of an attempt: merges, breaks, siblings, what is left out, and the account."""

from __future__ import annotations

import numpy as np
import pytest

from agl_grpc.sample import (
    DropReason,
    RowStart,
    SampleError,
    SampleRules,
    Truncated,
    build_attempt,
    prune_groups,
    total_account,
)
from agl_grpc.v1.model_call_pb2 import (
    LOGPROB_SEMANTICS_RAW,
    MODEL_CALL_OUTCOME_CUT,
    MODEL_CALL_OUTCOME_ERROR,
    SamplingParameters,
)
from agl_grpc.v1.reward_pb2 import Reward
from tests.sample.calls import call, choice, record


def test_turns_merge_into_one_row() -> None:
    out = build_attempt(record(call([1, 2], [3, 4], at=1), call([1, 2, 3, 4, 5], [6], at=2)))
    (row,) = out.rows
    assert row.prompt_ids.tolist() == [1, 2]
    assert row.response_ids.tolist() == [3, 4, 5, 6]
    assert row.response_mask.tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(row.logprobs, [-0.03, -0.04, 0.0, -0.06], rtol=1e-6)
    assert row.policy_versions.tolist() == [3, 3, -1, 3]
    arrays = (row.prompt_ids, row.response_mask, row.logprobs, row.policy_versions)
    assert [str(array.dtype) for array in arrays] == ["int32", "int8", "float32", "int64"]
    account = out.account
    assert (account.captured, account.trained, account.observation) == (10, 3, 3)
    assert account.dropped == {"merged_prefix": 4}


def test_a_retokenised_response_starts_a_new_row() -> None:
    out = build_attempt(record(call([1, 2], [3, 4], at=1), call([1, 2, 34, 5], [6], at=2)))
    assert [row.start for row in out.rows] == [RowStart.FIRST, RowStart.RESPONSE_CHANGED]
    assert [row.response_mask.tolist() for row in out.rows] == [[1, 1], [1]]


def test_a_rewritten_history_starts_a_new_row() -> None:
    out = build_attempt(record(call([1, 2], [3, 4], at=1), call([1, 9, 5], [6], at=2)))
    assert [row.start for row in out.rows] == [RowStart.FIRST, RowStart.PROMPT_CHANGED]


def test_a_branch_does_not_train_its_base_twice() -> None:
    base = call([1, 2], [3], at=1)
    out = build_attempt(record(base, call([1, 2, 3, 4], [5], at=2), call([1, 2, 3, 7], [8], at=3)))
    assert [row.start for row in out.rows] == [RowStart.FIRST, RowStart.BRANCH]
    assert out.rows[1].prompt_ids.tolist() == [1, 2, 3, 7]
    assert out.account.trained == 3


def test_unused_siblings_are_left_out() -> None:
    out = build_attempt(record(call([1], [2], [3], [4], at=1), call([1, 3, 9], [5], at=2)))
    (row,) = out.rows
    assert row.response_ids.tolist() == [3, 9, 5]
    assert out.account.dropped[DropReason.UNSELECTED_SIBLING] == 4


def test_all_siblings_count_when_none_is_used() -> None:
    out = build_attempt(record(call([1], [2], [3], at=1), call([1], [2], at=2)))
    assert [row.response_ids.tolist() for row in out.rows] == [[2], [3], [2]]
    assert {row.start for row in out.rows} == {RowStart.FIRST}


def test_a_rewarded_sibling_is_selected() -> None:
    attempt = record(call([1], [2], at=1), call([1], [3], at=2))
    attempt.rewards.append(Reward(value=0.5, target_span_id=(2).to_bytes(8)))  # type: ignore[attr-defined]
    out = build_attempt(attempt)
    assert [row.response_ids.tolist() for row in out.rows] == [[3]]
    assert out.reward == 1.0


def test_a_cut_call_is_context_only() -> None:
    cut = call([1], [2, 3], at=1, outcome=MODEL_CALL_OUTCOME_CUT)
    out = build_attempt(record(cut, call([1, 2, 3, 4], [5], at=2)))
    (row,) = out.rows
    assert row.start is RowStart.CUT
    assert row.prompt_ids.tolist() == [1, 2, 3, 4]
    assert out.account.dropped == {DropReason.NOT_COMPLETE: 3}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "val"}, DropReason.NOT_TRAIN_MODE),
        ({"model": "judge"}, DropReason.OTHER_MODEL),
        ({"untrainable_reason": "top_p"}, DropReason.UNTRAINABLE),
        ({"outcome": MODEL_CALL_OUTCOME_ERROR}, DropReason.NOT_COMPLETE),
        ({"agent_name": "judge"}, DropReason.OTHER_AGENT),
    ],
)
def test_what_must_not_be_trained_is_counted(changes: dict[str, object], reason: DropReason) -> None:
    rules = SampleRules(model="tiny", agents=frozenset({"", "solver"}))
    out = build_attempt(record(call([1, 2], [3], at=1, **changes)), rules)
    assert out.rows == []
    assert out.account.dropped == {reason: 3}


def test_raw_logprobs_at_another_temperature_are_not_trained() -> None:
    raw = call([1], [2], at=1, sampling=SamplingParameters(temperature=0.7))
    raw.span.model_call.logprob_semantics = LOGPROB_SEMANTICS_RAW
    assert build_attempt(record(raw)).account.dropped == {DropReason.LOGPROBS_UNKNOWN: 2}


def test_a_token_without_policy_version_is_not_trained() -> None:
    answer = choice([2, 3])
    answer.policy_runs[0].end = 1
    assert build_attempt(record(call([1], answer))).account.dropped == {DropReason.POLICY_VERSION_UNKNOWN: 3}


def test_another_temperature_starts_a_new_row() -> None:
    warm = call([1, 2, 3], [4], at=2, sampling=SamplingParameters(temperature=0.5))
    out = build_attempt(record(call([1], [2], at=1), warm))
    assert [(row.start, row.temperature) for row in out.rows] == [
        (RowStart.FIRST, 1.0),
        (RowStart.SAMPLING_CHANGED, 0.5),
    ]


def test_a_truncated_answer_keeps_its_row_without_loss() -> None:
    attempt = record(call([1], choice([2, 3], finish="length"), at=1), call([1, 2, 3, 4], [5], at=2))
    (row,) = build_attempt(attempt).rows
    assert row.response_mask.tolist() == [0, 0, 0, 1]
    assert build_attempt(attempt).account.dropped[DropReason.LENGTH] == 2
    (row,) = build_attempt(attempt, SampleRules(truncated=Truncated.TRAIN)).rows
    assert row.response_mask.tolist() == [1, 1, 0, 1]


def test_no_reward_means_no_rows() -> None:
    out = build_attempt(record(call([1], [2]), reward=None))
    assert (out.rows, out.reward, out.account.dropped) == ([], None, {DropReason.NO_REWARD: 2})


def test_the_newest_revision_of_the_primary_reward_counts() -> None:
    attempt = record(call([1], [2]), reward=0.25)
    attempt.rewards.extend(  # type: ignore[attr-defined]
        [
            Reward(name="primary", value=0.75, revision=3),
            Reward(value=0.5, revision=2),
            Reward(name="style", value=9.0, revision=9),
            Reward(value=8.0, revision=9, step=0),
        ]
    )
    assert build_attempt(attempt).reward == 0.75


def test_late_spans_are_never_trained() -> None:
    late = call([1], [2])
    late.late = True
    assert build_attempt(record(late)).account.dropped == {DropReason.LATE: 2}


def test_delta_prompts_are_refused() -> None:
    delta = call([1], [2])
    delta.span.model_call.prompt.base_span_id = b"12345678"
    with pytest.raises(SampleError, match="delta prompt"):
        build_attempt(record(delta))


def test_arrays_of_different_length_are_refused() -> None:
    wrong = call([1], [2, 3])
    del wrong.span.model_call.choices[0].logprobs[1:]
    with pytest.raises(SampleError, match="2 token ids but 1 logprobs"):
        build_attempt(record(wrong))


def test_groups_that_are_too_small_are_dropped_whole() -> None:
    attempts = [
        build_attempt(record(call([1], [2]), rollout="a", group="pair")),
        build_attempt(record(call([1], [2]), rollout="b", group="single")),
        build_attempt(record(call([1], [3]), rollout="c", group="pair", reward=0.0)),
        build_attempt(record(call([1], [3]), rollout="d", group="single", reward=None)),
    ]
    kept, dropped = prune_groups(attempts)
    assert [a.rollout_id for a in kept] == ["a", "c"]
    assert [a.rollout_id for a in dropped] == ["b", "d"]
    total = total_account([*kept, *dropped])
    assert total.captured == 8
    assert total.dropped == {DropReason.GROUP_TOO_SMALL: 2, DropReason.NO_REWARD: 2}
