"""Ways in which token-level training data goes wrong, one named test each; the number is the pitfall's.

Numbers that are missing concern engines, weights, groups or credentials, not samples: `docs/pitfalls.md` says
where their tests are. Marked as recorded are cases that a small model on a CPU cannot show.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.learner.batch.checks import LogprobLimits, LogprobRow, check_logprobs
from agl_grpc.learner.errors import FidelityError
from agl_grpc.sample import (
    DropReason,
    OverLong,
    RowStart,
    Sample,
    SampleError,
    SampleRules,
    Truncated,
    build_attempt,
    judge,
    token_digest,
)
from agl_grpc.sample.breaks import compare_texts
from agl_grpc.v1.model_call_pb2 import (
    LOGPROB_SEMANTICS_RAW,
    MODEL_CALL_OUTCOME_CUT,
    PolicyRun,
    SamplingParameters,
)
from agl_grpc.v1.reward_pb2 import Reward
from agl_grpc.v1.span_pb2 import StoredSpan
from tests.sample.calls import call, choice, record
from tests.store.span_support import group, make_attempts, serving

WORDS = {1: "<user>", 2: "a", 3: "b", 23: "ab", 4: "<end>", 5: "<think>x</think>", 6: '{"k":1,"l":2}'}
WORDS |= {7: '{"l": 2, "k": 1}', 8: "c"}


def decode(ids: object) -> str:
    """Text by a vocabulary in which one text has several tokenisations."""
    return "".join(WORDS[i] for i in ids)  # type: ignore[attr-defined]  # a list of ids


def test_01_retokenised_answers_are_told_and_keep_their_sampled_ids() -> None:
    attempt = record(call([1], [2, 3, 4], at=1), call([1, 23, 4, 1], [8], at=2))
    out = build_attempt(attempt, decode=decode)
    assert [row.response_ids.tolist() for row in out.rows] == [[2, 3, 4], [8]]
    assert out.row_starts == {"first": 1, "retokenised": 1}


def test_02_stripped_thinking_breaks_the_row_as_template() -> None:
    attempt = record(call([1], [5, 2, 4], at=1), call([1, 2, 4, 1], [8], at=2))
    assert build_attempt(attempt, decode=decode).rows[1].start is RowStart.TEMPLATE
    assert build_attempt(attempt).rows[1].start is RowStart.RESPONSE_CHANGED


def test_03_reserialised_tool_calls_are_told_and_keep_their_sampled_ids() -> None:
    attempt = record(call([1], [6, 4], at=1), call([1, 7, 4, 1], [8], at=2))
    out = build_attempt(attempt, decode=decode)
    assert out.rows[1].start is RowStart.TOOL_CALL_RESERIALISED
    assert out.rows[0].response_ids.tolist() == [6, 4]
    quoted = ('{"name":"f","arguments":"{\\"a\\": 1}"}', '{"arguments": {"a":1}, "name": "f"}')
    assert compare_texts(*quoted) is RowStart.TOOL_CALL_RESERIALISED


def test_04_only_sampled_tokens_have_mask_1_at_the_boundaries() -> None:
    (row,) = build_attempt(
        record(call([1, 10], [2, 4], at=1), call([1, 10, 2, 4, 9, 1, 10], [3, 4], at=2))
    ).rows
    assert row.response_mask.tolist() == [1, 1, 0, 0, 0, 1, 1]


def test_05_an_end_that_the_template_adds_to_a_truncated_answer_is_not_trained() -> None:
    cut = call([1], choice([2, 3], finish="length"), at=1)
    (row,) = build_attempt(
        record(cut, call([1, 2, 3, 4, 1], [8], at=2)), SampleRules(truncated=Truncated.TRAIN)
    ).rows
    assert row.response_mask.tolist() == [1, 1, 0, 0, 1]
    out = build_attempt(record(cut, call([1, 2, 4, 1], [8], at=2)))
    assert out.rows[1].start is RowStart.TRUNCATION


def test_06_observations_have_mask_0_logprob_0_and_no_version() -> None:
    (row,) = build_attempt(record(call([1], [2], at=1), call([1, 2, 8, 8], [3], at=2))).rows
    seen = row.response_mask == 0
    assert (row.logprobs[seen] == 0).all()
    assert (row.policy_versions[seen] == -1).all()


def test_07_a_cut_answer_is_context_of_what_follows() -> None:
    cut = call([1], [2, 3], at=1, outcome=MODEL_CALL_OUTCOME_CUT)
    out = build_attempt(record(cut, call([1, 2, 3, 8], [4], at=2)))
    assert out.row_starts == {"cut": 1}
    assert out.account.dropped == {DropReason.NOT_COMPLETE: 3}


def test_08_of_a_retried_call_only_the_consumed_answer_is_trained() -> None:
    retry = call([1], [3], at=2, retry_of=(1).to_bytes(8))
    out = build_attempt(record(call([1], [2], at=1), retry))
    assert [row.response_ids.tolist() for row in out.rows] == [[3]]
    assert out.account.dropped == {DropReason.ORPHAN: 2}


def test_09_identical_prompts_keep_all_their_answers() -> None:
    calls = [call([1, 2], [3], at=at) for at in range(1, 9)]
    out = build_attempt(record(*calls, call([1, 2], [3], [4], [3], [5], at=9)))
    assert len(out.rows) == 12


def test_10_parallel_sub_agents_are_each_delivered_and_their_base_is_trained_once() -> None:
    calls = [
        call([1], [2], at=1),
        call([1, 2, 8], [3], at=2),
        call([1, 2, 9], [4], at=3),
        call([7], [6], at=4),
    ]
    out = build_attempt(record(*calls))
    assert [row.start for row in out.rows] == [RowStart.FIRST, RowStart.BRANCH, RowStart.PROMPT_CHANGED]
    assert out.account.trained == 4


def test_11_a_compacted_history_is_a_new_row_and_nothing_is_trained_again() -> None:
    out = build_attempt(record(call([1], [2], at=1), call([1, 2, 3], [4], at=2), call([1, 23], [8], at=3)))
    assert out.account.trained == 3
    assert len(out.rows) == 2


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_13_logprobs_that_are_no_numbers_are_refused(bad: float) -> None:
    broken = call([1], [2, 3])
    broken.span.model_call.choices[0].logprobs[1] = bad
    with pytest.raises(SampleError, match="not finite"):
        build_attempt(record(broken))


def test_14_one_call_without_usable_logprobs_is_left_out_by_name() -> None:
    unknown = call([7], [8], at=2)
    unknown.span.model_call.logprob_semantics = 0
    out = build_attempt(record(call([1], [2], at=1), unknown))
    assert len(out.rows) == 1
    assert out.account.dropped == {DropReason.LOGPROBS_UNKNOWN: 2}


def test_16_raw_logprobs_at_another_temperature_are_not_trained() -> None:
    raw = call([1], [2], sampling=SamplingParameters(temperature=0.7))
    raw.span.model_call.logprob_semantics = LOGPROB_SEMANTICS_RAW
    assert build_attempt(record(raw)).rows == []


def test_17_truncated_sampling_that_was_not_overridden_is_not_trained() -> None:
    out = build_attempt(record(call([1], [2], untrainable_reason="top_p 0.8")))
    assert out.account.dropped == {DropReason.UNTRAINABLE: 2}


def test_19_weights_swapped_in_mid_answer_split_its_versions_at_the_token() -> None:
    answer = choice([2, 3, 4])
    del answer.policy_runs[:]
    answer.policy_runs.extend(
        [PolicyRun(start=0, end=1, policy_version=3), PolicyRun(start=1, end=3, policy_version=4)]
    )
    (row,) = build_attempt(record(call([1], answer))).rows
    assert row.policy_versions.tolist() == [3, 4, 4]


def test_24_an_attempt_without_a_reward_is_left_out_and_never_counts_as_zero() -> None:
    out = build_attempt(record(call([1], [2]), reward=None))
    assert (out.reward, out.rows, out.account.dropped) == (None, [], {DropReason.NO_REWARD: 2})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_24_a_reward_that_is_no_number_is_named(value: float) -> None:
    out = build_attempt(record(call([1], [2]), reward=value))
    assert out.account.dropped == {DropReason.REWARD_NOT_FINITE: 2}


def test_28_over_long_rows_are_dropped_or_end_with_a_whole_answer_and_are_counted() -> None:
    attempt = record(call([1], [2, 3], at=1), call([1, 2, 3, 8], [4, 5], at=2))
    dropped = build_attempt(attempt, SampleRules(max_row_tokens=5))
    assert dropped.rows == []
    assert dropped.account.dropped == {DropReason.OVER_LONG: 9}
    (row,) = build_attempt(attempt, SampleRules(max_row_tokens=5, over_long=OverLong.CUT)).rows
    assert (row.prompt_ids.tolist(), row.response_ids.tolist()) == ([1], [2, 3])


def test_28_empty_attempts_have_no_rows_and_a_balanced_account() -> None:
    out = build_attempt(record())
    assert (out.rows, out.account.captured) == ([], 0)


def test_30_recorded_several_tokens_of_one_engine_step_keep_order_and_number() -> None:
    # Recorded: a speculative engine answers in steps of several tokens; what counts is the final arrays.
    (row,) = build_attempt(record(call([1], list(range(2, 40))))).rows
    assert row.response_ids.tolist() == list(range(2, 40))
    np.testing.assert_allclose(row.logprobs, [-0.01 * i for i in range(2, 40)], rtol=1e-6)


def test_31_rewards_and_logprobs_keep_every_bit() -> None:
    out = build_attempt(record(call([1], [2]), reward=0.1))
    assert out.rows[0].reward == 0.1
    assert out.rows[0].logprobs.tobytes() == np.array([-0.02], "<f4").tobytes()


def test_32_the_newest_revision_counts_and_several_rewards_are_weighted() -> None:
    rewards = [Reward(value=1.0, revision=1), Reward(value=0.5, revision=2), Reward(name="style", value=2.0)]
    assert judge(rewards, SampleRules()).value == 0.5
    weighted = SampleRules(reward_weights=(("primary", 1.0), ("style", 0.25)))
    assert judge(rewards, weighted).value == 1.0
    assert judge(rewards[:1], weighted).value is None


def test_32_rewards_of_steps_and_calls_are_credited_to_their_answers() -> None:
    attempt = record(call([1], [2], at=1), call([1, 2, 8], [3], at=2), reward=1.0)
    attempt.rewards.extend([Reward(value=0.5, step=0), Reward(value=0.25, target_span_id=(2).to_bytes(8))])  # type: ignore[attr-defined]
    attempt.rewards.append(Reward(value=9.0, step=7))  # type: ignore[attr-defined]
    out = build_attempt(attempt, SampleRules(discount=0.5))
    assert [(turn.reward, turn.ret) for turn in out.rows[0].turns] == [(0.5, 1.125), (0.25, 1.25)]
    assert (out.reward, out.unplaced_rewards) == (1.0, 1)


def logprob(prefix: Sequence[int], token: int) -> float:
    """What a toy model, for which every earlier token matters, says of a token."""
    digest = hashlib.blake2b(repr((*prefix, token)).encode(), digest_size=4).digest()
    return -1.0 - int.from_bytes(digest) / 2**32


def sampled(prompt: list[int], answer: list[int], at: int) -> StoredSpan:
    """A call whose logprobs are the toy model's under the prompt that it was sampled from."""
    made = call(prompt, answer, at=at)
    lps = [logprob([*prompt, *answer[:place]], token) for place, token in enumerate(answer)]
    made.span.model_call.choices[0].logprobs[:] = lps
    return made


def recomputed(row: Sample) -> LogprobRow:
    """The toy model's logprobs of a row's tokens, each under the tokens before it in the row."""
    tokens = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
    first = len(row.prompt_ids)
    lps = np.array([logprob(tokens[:place], tokens[place]) for place in range(first, len(tokens))], "<f4")
    return LogprobRow("g_0_0", row.logprobs, lps, row.response_mask.astype(np.int64), row.policy_versions)


def test_12_every_trained_token_stands_behind_the_tokens_it_was_sampled_behind() -> None:
    """Histories that grow, branch, are re-tokenised and rewritten: no row splices an answer into another."""
    spans = [
        sampled([1, 2], [3, 4], at=1),
        sampled([1, 2, 3, 4, 5], [6, 7], at=2),
        sampled([1, 2, 3, 4, 8], [9], at=3),
        sampled([1, 2, 34, 5], [6, 7], at=4),
        sampled([9, 9], [3, 4], at=5),
    ]
    out = build_attempt(record(*spans))
    assert len(out.rows) == 4
    for row in out.rows:
        found = check_logprobs([recomputed(row)], version=3, limits=LogprobLimits())
        assert found["check/logprob_tokens_compared"] == row.trained_tokens
        assert found["check/logprob_max_difference"] < 1e-6
    # The answer to the re-rendered history, put behind the tokens of the first: what the check is for.
    whole, broken = out.rows[0], out.rows[2]
    spliced = replace(broken, prompt_ids=np.array([*whole.prompt_ids, 3, 4, 5], np.int32))
    with pytest.raises(FidelityError, match="sampled and recomputed logprobs differ"):
        check_logprobs([recomputed(spliced)], version=3, limits=LogprobLimits())


def test_15_the_divergence_of_sampler_and_trainer_is_reported_and_zero_for_the_same_weights() -> None:
    (row,) = build_attempt(record(sampled([1], list(range(2, 40)), at=1))).rows
    same = recomputed(row)
    lax = LogprobLimits(maximum=9.0, mean=9.0)
    assert check_logprobs([same], version=3, limits=lax)["check/kl_sampler_trainer"] < 1e-12
    # Errors of both signs do not cancel.
    off = replace(same, recomputed=same.recomputed + np.array([0.1, -0.1] * 19, "<f4"))
    found = check_logprobs([off], version=3, limits=lax)
    assert found["check/kl_sampler_trainer"] == pytest.approx(math.cosh(0.1) - 1, rel=1e-4)


@pytest.mark.parametrize("per_token", [2 * 8, 0])
async def test_18_recorded_routing_of_experts_is_stored_whole_and_changes_no_row(per_token: int) -> None:
    """Recorded: no mixture model runs on a small CPU. Two layers, the eight best experts of each."""
    routing = np.random.default_rng(0).integers(0, 64, (3, per_token), dtype=np.uint8).tobytes()
    answer = choice([2, 3, 4])
    answer.routed_experts = routing
    async with serving() as (server, _), StoreClient(server.address) as client:
        await make_attempts(server, "x")
        stored = await client.append_spans([group("x", call([1], answer).span)])
        assert not stored.rejected
        (back,) = [span async for span in client.export_spans(rollout_ids=["ro-x"])]
    (found,) = back.span.model_call.choices
    assert np.frombuffer(found.routed_experts, np.uint8).reshape(3, -1).shape == (3, per_token)
    assert found.routed_experts == routing
    assert token_digest(build_attempt(record(back)).rows) == token_digest(
        build_attempt(record(call([1], [2, 3, 4]))).rows
    )


def test_27_recorded_images_keep_their_placeholders_and_are_not_trained() -> None:
    """Recorded: two images over two turns, four and six patches, as an engine expands them."""
    image, reason = 9, "multimodal prompt: only its token ids are captured"
    first = call([1, *[image] * 4, 2], [3], at=1, untrainable_reason=reason)
    second = call([1, *[image] * 4, 2, 3, *[image] * 6, 2], [4], at=2, untrainable_reason=reason)
    text = call([1, 7], [5], at=3)
    out = build_attempt(record(first, second, text))
    assert [row.response_ids.tolist() for row in out.rows] == [[5]]
    assert out.account.dropped == {DropReason.UNTRAINABLE: 7 + 15}
    assert list(second.span.model_call.prompt.token_ids).count(image) == 4 + 6
