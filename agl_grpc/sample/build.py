"""From a sealed attempt to its rows, with every captured token accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from agl_grpc.sample.calls import Answer, read_answers
from agl_grpc.sample.rewards import final_reward, rewarded_spans
from agl_grpc.sample.trajectory import Merge, Trajectory, merge_answers
from agl_grpc.sample.types import (
    AttemptRecord,
    AttemptSamples,
    DropReason,
    Float32Array,
    Int8Array,
    Int32Array,
    Int64Array,
    Sample,
    SampleRules,
    TokenAccount,
)

DEFAULT_RULES = SampleRules()


def build_attempt(record: AttemptRecord, rules: SampleRules = DEFAULT_RULES) -> AttemptSamples:
    """Rows and token account of one sealed attempt.

    Without a reward, or with an incomplete capture, there are no rows and all tokens are accounted as
    dropped. Raises SampleError for data that cannot be right.
    """
    answers = read_answers(record.spans, rules)
    captured = sum(len(answer.sequence) for answer in answers)
    reward = final_reward(record.rewards, rules.reward_name)
    refusal = _refusal(record, reward)
    if refusal is not None or reward is None:
        reason = refusal or DropReason.NO_REWARD
        account = TokenAccount(captured=captured, dropped=Counter({reason.value: captured}))
        return AttemptSamples(record.rollout_id, record.attempt_id, record.group_id, reward, [], account)
    merge = merge_answers(answers, rewarded_spans(record.rewards))
    rows = [_row(record, trajectory, reward, rules) for trajectory in merge.trajectories]
    account = _account(captured, merge, rows, rules)
    account.check()
    starts = Counter(row.start.value for row in rows)
    return AttemptSamples(
        record.rollout_id, record.attempt_id, record.group_id, reward, rows, account, starts
    )


def prune_groups(
    attempts: Iterable[AttemptSamples], rules: SampleRules = DEFAULT_RULES
) -> tuple[list[AttemptSamples], list[AttemptSamples]]:
    """Split attempts into those that are trained and those that are not, in the order given.

    An attempt without rows is not trained; a group with fewer than `minimum_group` rollouts that have
    rows is dropped whole (its tokens then count as `group_too_small`). An empty group id is no group.
    """
    attempts = list(attempts)
    sizes = Counter(a.group_id for a in attempts if a.rows)
    kept: list[AttemptSamples] = []
    dropped: list[AttemptSamples] = []
    for attempt in attempts:
        small = bool(attempt.group_id) and sizes[attempt.group_id] < rules.minimum_group
        if attempt.rows and not small:
            kept.append(attempt)
        else:
            dropped.append(_drop_rows(attempt) if attempt.rows else attempt)
    return kept, dropped


def zero_variance_groups(attempts: Iterable[AttemptSamples]) -> int:
    """How many groups have equal rewards throughout (they teach nothing under GRPO)."""
    rewards: dict[str, set[float | None]] = {}
    for attempt in attempts:
        rewards.setdefault(attempt.group_id, set()).add(attempt.reward)
    return sum(len(values) == 1 for group, values in rewards.items() if group)


def total_account(attempts: Iterable[AttemptSamples]) -> TokenAccount:
    """The accounts of attempts added up; raises SampleError unless the sum balances."""
    total = TokenAccount()
    for attempt in attempts:
        total.add(attempt.account)
    total.check()
    return total


def _refusal(record: AttemptRecord, reward: float | None) -> DropReason | None:
    if record.capture_incomplete:
        return DropReason.CAPTURE_INCOMPLETE
    return DropReason.NO_REWARD if reward is None else None


def _drop_rows(attempt: AttemptSamples) -> AttemptSamples:
    kept_tokens = attempt.account.trained + attempt.account.observation
    dropped = attempt.account.dropped + Counter({DropReason.GROUP_TOO_SMALL.value: kept_tokens})
    account = TokenAccount(captured=attempt.account.captured, dropped=dropped)
    account.check()
    return AttemptSamples(
        attempt.rollout_id,
        attempt.attempt_id,
        attempt.group_id,
        attempt.reward,
        [],
        account,
        attempt.row_starts,
    )


def _row(record: AttemptRecord, trajectory: Trajectory, reward: float, rules: SampleRules) -> Sample:
    first, last = trajectory.answers[0], trajectory.answers[-1]
    prompt_length = first.prompt_length
    response_ids: Int32Array = last.sequence[prompt_length:]
    mask: Int8Array = np.zeros(len(response_ids), dtype=np.int8)
    logprobs: Float32Array = np.zeros(len(response_ids), dtype=np.float32)
    versions: Int64Array = np.full(len(response_ids), -1, dtype=np.int64)
    for answer in trajectory.answers:
        if _left_out(answer, rules):
            continue
        place = slice(answer.prompt_length - prompt_length, len(answer.sequence) - prompt_length)
        mask[place] = 1
        logprobs[place] = answer.logprobs
        versions[place] = answer.versions
    return Sample(
        rollout_id=record.rollout_id,
        attempt_id=record.attempt_id,
        group_id=record.group_id,
        prompt_ids=first.prompt,
        response_ids=response_ids,
        response_mask=mask,
        logprobs=logprobs,
        policy_versions=versions,
        reward=reward,
        temperature=first.temperature,
        span_ids=tuple(answer.span_id for answer in trajectory.answers),
        start=trajectory.start,
    )


def _left_out(answer: Answer, rules: SampleRules) -> bool:
    return answer.truncated and not rules.train_truncated


def _account(captured: int, merge: Merge, rows: Sequence[Sample], rules: SampleRules) -> TokenAccount:
    dropped: Counter[str] = Counter()
    for answer, reason in merge.excluded:
        dropped[reason.value] += len(answer.sequence)
    trained = left_out = 0
    for trajectory in merge.trajectories:
        dropped[DropReason.MERGED_PREFIX.value] += sum(len(a.sequence) for a in trajectory.answers[:-1])
        left_out += sum(len(a.response) for a in trajectory.answers if _left_out(a, rules))
        trained += sum(len(a.response) for a in trajectory.answers if not _left_out(a, rules))
    dropped[DropReason.LENGTH.value] += left_out
    # Counted from the rows, not as a remainder: answers that overlapped in a mask would not balance.
    masked = sum(row.length - row.trained_tokens for row in rows)
    return TokenAccount(captured, trained, masked - left_out, +dropped)
