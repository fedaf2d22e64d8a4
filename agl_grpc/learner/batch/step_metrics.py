"""Metrics of a batch that verl does not report, computed on its rollouts; names stand in docs/metrics.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from agl_grpc.learner.batch.checks import LogprobRow, join_rows
from agl_grpc.learner.rollouts.groups import FinishedRollout, IntArray

_PERCENTILES = (50, 90, 99)
_NGRAMS = (1, 2, 4)


def sampler_distance(rows: Iterable[LogprobRow], *, version: int) -> dict[str, float]:
    """KL(sampler ‖ trainer) in nats a token, over the tokens of the weights in force and over all.

    The k3 estimator of J. Schulman, "Approximating KL Divergence" (2020): the mean of r - 1 - ln r with
    r = trainer / sampler; never negative. In float64: at 1e-9, the usual value, verl's own rounds to 0.
    """
    batch = join_rows(rows)
    trained = batch.mask.astype(bool)
    log_ratio = batch.recomputed[trained].astype(np.float64) - batch.sampled[trained]
    # exp(50) is far beyond any alarm, and stays finite in every sum.
    every = np.expm1(np.minimum(log_ratio, 50.0)) - log_ratio
    fresh = every[batch.versions[trained] == version]
    names = {"kl/sampler_trainer_k3": fresh, "kl/sampler_trainer_k3_all": every}
    return {name: float(values.mean()) for name, values in names.items() if len(values)}


def distinct_share(tokens: IntArray, length: int) -> float | None:
    """Share of different ones among the n-grams of a sequence; None when it has none.

    Distinct-n of Li et al., "A Diversity-Promoting Objective Function" (2016), for one sequence.
    """
    if len(tokens) < length:
        return None
    # Each n-gram gets a number: that of its first n - 1 tokens, by their order, and its last token's. Numbers
    # sort many times faster than rows of an array do.
    _, codes = np.unique(tokens, return_inverse=True)
    kinds = int(codes.max()) + 1
    grams = codes
    for size in range(1, length):
        _, grams = np.unique(grams[:-1] * kinds + codes[size:], return_inverse=True)
    return (int(grams.max()) + 1) / len(grams)


def batch_metrics(rollouts: Sequence[FinishedRollout]) -> dict[str, float]:
    """Lengths, repetition, truncation, tools, form and verdicts of a batch's rollouts."""
    rows = [row for rollout in rollouts for row in rollout.rows]
    metrics: dict[str, float] = {}
    if rows:
        lengths = np.array([len(row.response_ids) for row in rows])
        for percentile in _PERCENTILES:
            metrics[f"response_length/p{percentile}"] = float(np.percentile(lengths, percentile))
    for size in _NGRAMS:
        shares = [distinct_share(row.response_ids[row.response_mask == 1], size) for row in rows]
        found = [share for share in shares if share is not None]
        if found:
            metrics[f"repetition/distinct_{size}"] = float(np.mean(found))
    return {**metrics, **_facts(rollouts)}


def _facts(rollouts: Sequence[FinishedRollout]) -> dict[str, float]:
    facts = [rollout.facts for rollout in rollouts]
    answers, results = sum(each.answers for each in facts), sum(each.tool_results for each in facts)
    metrics: dict[str, float] = {}
    if answers:
        metrics["answers/count"] = float(answers)
        metrics["answers/truncated"] = sum(each.truncated for each in facts) / answers
    if results:
        metrics["tools/results"] = float(results)
        metrics["tools/error_rate"] = sum(each.tool_errors for each in facts) / results
    malformed = [each.malformed for each in facts if each.malformed is not None]
    if malformed:
        metrics["answers/format_error_rate"] = float(np.mean(malformed))
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in chain.from_iterable(each.verdicts for each in facts):
        values[f"grader/{verdict.grader}/{verdict.name}"].append(verdict.value)
    for name, found in values.items():
        metrics[f"{name}/mean"], metrics[f"{name}/std"] = float(np.mean(found)), float(np.std(found))
    return metrics


def unfinished(values: object) -> int:
    """How many gradient norms are not finite: verl prints and skips those updates. A number or many."""
    return int((~np.isfinite(np.asarray(values, dtype=np.float64))).sum())
