"""From a sealed attempt to its rows, with every captured token accounted for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from agl_grpc.sample.breaks import Decode
from agl_grpc.sample.calls import Answer, read_answers
from agl_grpc.sample.rewards import Judgement, credit, judge, rewarded_spans
from agl_grpc.sample.trajectory import Merge, Trajectory, merge_answers
from agl_grpc.sample.tree import TokenTree
from agl_grpc.sample.types import (
    AttemptRecord,
    AttemptSamples,
    DropReason,
    Float32Array,
    Int8Array,
    Int64Array,
    OverLong,
    Sample,
    SampleRules,
    TokenAccount,
    Truncated,
    Turn,
)

DEFAULT_RULES = SampleRules()


@dataclass(slots=True)
class Reading:
    """An attempt read by the rules: its token tree, its answers, and what becomes of them.

    refusal: why nothing of the attempt is trained; None = `merge` says what is. kept: the answers that stay
    in a row, by the length limit of rows; the others of `merge.trajectories` are over-long.
    """

    tree: TokenTree
    answers: list[Answer]
    judgement: Judgement
    merge: Merge
    kept: list[Trajectory]
    refusal: DropReason | None


def read_attempt(record: AttemptRecord, rules: SampleRules, decode: Decode | None = None) -> Reading:
    """Reads an attempt. Raises SampleError for data that cannot be right."""
    tree = TokenTree()
    answers = read_answers(record.spans, rules, tree)
    judgement = judge(record.rewards, rules)
    refusal = _refusal(record, judgement)
    if refusal is not None:
        return Reading(tree, answers, judgement, Merge([], []), [], refusal)
    # Late calls are counted, but change nothing: a batch that was frozen before they came knows none of them.
    late = [answer for answer in answers if answer.excluded is DropReason.LATE]
    known = answers[: len(answers) - len(late)]
    merge = merge_answers(tree, known, rewarded_spans(record.rewards), decode)
    merge.excluded.extend((answer, DropReason.LATE) for answer in late)
    if rules.truncated is Truncated.DROP and any(
        answer.truncated for trajectory in merge.trajectories for answer in trajectory.answers
    ):
        return Reading(tree, answers, judgement, Merge([], []), [], DropReason.LENGTH)
    kept = _shorten(merge.trajectories, rules) if rules.max_row_tokens else merge.trajectories
    return Reading(tree, answers, judgement, merge, kept, None)


def build_attempt(
    record: AttemptRecord, rules: SampleRules = DEFAULT_RULES, decode: Decode | None = None
) -> AttemptSamples:
    """Rows and token account of one sealed attempt.

    Without a reward, or with an incomplete capture, there are no rows and all tokens are accounted as
    dropped. `decode` turns token ids into text: with it breaks are told apart by their texts. Raises
    SampleError for data that cannot be right.
    """
    reading = read_attempt(record, rules, decode)
    captured = sum(answer.length for answer in reading.answers)
    value = reading.judgement.value
    if reading.refusal is not None or value is None:
        reason = reading.refusal or DropReason.NO_REWARD
        account = TokenAccount(
            captured=captured, dropped=Counter({reason.value: captured} if captured else {})
        )
        return AttemptSamples(record.rollout_id, record.attempt_id, record.group_id, value, [], account)
    trained = [answer for trajectory in reading.kept for answer in trajectory.answers]
    trained.sort(key=lambda answer: answer.place)
    credits, unplaced = credit([a.span_id for a in trained], reading.judgement, rules.discount)
    credit_of = {answer.place: pair for answer, pair in zip(trained, credits, strict=True)}
    rows = [_row(record, reading, trajectory, value, rules, credit_of) for trajectory in reading.kept]
    account = _account(captured, reading, rows, rules)
    account.check()
    starts = Counter(row.start.value for row in rows)
    return AttemptSamples(
        record.rollout_id, record.attempt_id, record.group_id, value, rows, account, starts, unplaced
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


def left_out(answer: Answer, rules: SampleRules) -> bool:
    """Whether an answer stays in its row without being trained."""
    return answer.truncated and rules.truncated is Truncated.MASK


def _refusal(record: AttemptRecord, judgement: Judgement) -> DropReason | None:
    if record.capture_incomplete:
        return DropReason.CAPTURE_INCOMPLETE
    if judgement.value is None:
        return DropReason.GRADER_FAILED if judgement.failed else DropReason.NO_REWARD
    return None if math.isfinite(judgement.value) else DropReason.REWARD_NOT_FINITE


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


def _shorten(trajectories: Sequence[Trajectory], rules: SampleRules) -> list[Trajectory]:
    """Trajectories within the limit of a row."""
    kept = []
    for trajectory in trajectories:
        fitting = [answer for answer in trajectory.answers if answer.length <= rules.max_row_tokens]
        if len(fitting) == len(trajectory.answers):
            kept.append(trajectory)
        elif fitting and rules.over_long is OverLong.CUT:
            kept.append(Trajectory(fitting, trajectory.start))
    return kept


def _row(
    record: AttemptRecord,
    reading: Reading,
    trajectory: Trajectory,
    reward: float,
    rules: SampleRules,
    credit_of: dict[int, tuple[float, float]],
) -> Sample:
    answers = trajectory.answers
    first, tree = answers[0], reading.tree
    prompt_length = first.prompt_length
    if len(answers) == 1 and not left_out(first, rules):
        response_ids, logprobs, versions = first.response, first.logprobs, first.versions
        mask: Int8Array = np.ones(len(response_ids), dtype=np.int8)
    else:
        response_ids = tree.tokens(answers[-1].end, prompt_length)
        mask = np.zeros(len(response_ids), dtype=np.int8)
        logprobs = np.zeros(len(response_ids), dtype=np.float32)
        versions = np.full(len(response_ids), -1, dtype=np.int64)
        _fill(mask, logprobs, versions, [a for a in answers if not left_out(a, rules)], prompt_length)
    turns = [
        Turn(
            a.span_id, a.index, a.prompt_length - prompt_length, a.length - prompt_length, *credit_of[a.place]
        )
        for a in answers
    ]
    return Sample(
        record.rollout_id,
        record.attempt_id,
        record.group_id,
        tree.tokens(first.prompt),
        response_ids,
        mask,
        logprobs,
        versions,
        reward,
        first.temperature,
        tuple(turns),
        trajectory.start,
        reading.judgement.named,
    )


def _fill(
    mask: Int8Array,
    logprobs: Float32Array,
    versions: Int64Array,
    trained: Sequence[Answer],
    prompt_length: int,
) -> None:
    """Writes the trained answers into the arrays of a row."""
    for answer in trained:
        place = slice(answer.prompt_length - prompt_length, answer.length - prompt_length)
        mask[place] = 1
        logprobs[place] = answer.logprobs
        versions[place] = answer.versions


def _account(captured: int, reading: Reading, rows: Sequence[Sample], rules: SampleRules) -> TokenAccount:
    if len(reading.answers) == len(rows) == 1 and not left_out(reading.answers[0], rules):
        # Nothing but one trained answer, as most attempts of one call are.
        trained = rows[0].trained_tokens
        return TokenAccount(captured, trained, rows[0].length - trained)
    dropped: Counter[str] = Counter()
    for answer, reason in reading.merge.excluded:
        dropped[reason.value] += answer.length
    trained = masked_out = 0
    for trajectory in reading.kept:
        dropped[DropReason.MERGED_PREFIX.value] += sum(a.length for a in trajectory.answers[:-1])
        masked_out += sum(len(a.response) for a in trajectory.answers if left_out(a, rules))
        trained += sum(len(a.response) for a in trajectory.answers if not left_out(a, rules))
    dropped[DropReason.LENGTH.value] += masked_out
    if rules.max_row_tokens:
        within = {answer.place for trajectory in reading.kept for answer in trajectory.answers}
        dropped[DropReason.OVER_LONG.value] += sum(
            a.length for t in reading.merge.trajectories for a in t.answers if a.place not in within
        )
    # Counted from the rows, not as a remainder: answers that overlapped in a mask would not balance.
    masked = sum(row.length - row.trained_tokens for row in rows)
    return TokenAccount(captured, trained, masked - masked_out, +dropped)
