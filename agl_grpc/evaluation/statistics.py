"""What rewards of several answers to each of many tasks say, and how surely. Pure functions.

The tasks are the sample: intervals and tests are over tasks, never over single answers, because answers to
one task are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agl_grpc.evaluation.errors import EvaluationError

RESAMPLES = 10_000
LEVEL = 0.95
# Up to this many tasks that differ, all sign flips are tried instead of random ones: 2^12 of them.
_EXACT = 12
_CELLS_AT_ONCE = 4_000_000
Floats = npt.NDArray[np.float64]


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that at least one of ``k`` answers drawn from those without replacement is right.

    This is the unbiased estimator of pass@k, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code").

    Args:
        answers: how many there are, n.
        right: how many of them are right, c.
        k: how many are drawn.

    Raises:
        EvaluationError: k is below 1 or above ``answers``: n answers say nothing of more than n.
    """
    if k < 1:
        raise EvaluationError(f"pass@{k}: k must be 1 or more")
    if k > answers:
        raise EvaluationError(f"pass@{k} needs {k} or more answers for each task, and there are {answers}")
    if not 0 <= right <= answers:
        raise EvaluationError(f"{right} of {answers} answers cannot be right")
    return 1.0 - math.prod(1.0 - k / left for left in range(answers - right + 1, answers + 1))


def majority(answers: Sequence[Hashable | None], rewards: Sequence[float]) -> float | None:
    """The reward of the answer that was given most often.

    Answers that are None do not vote. The reward of an answer is the mean over those who gave it; of answers
    with equally many votes the mean is taken, as if one were drawn.

    Returns:
        None when nobody voted.
    """
    votes: dict[Hashable, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(reward)
    if not votes:
        return None
    most = max(map(len, votes.values()))
    winners = [sum(given) / len(given) for given in votes.values() if len(given) == most]
    return sum(winners) / len(winners)


@dataclass(frozen=True)
class Interval:
    """A range that holds the true value at the level of confidence: 95 %."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """The interval of the mean over tasks: percentiles of the means of tasks drawn with replacement (Efron).

    The same seed gives the same interval. One task has no interval: None.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return None
    means = _means_of_resamples(sample, np.random.default_rng(seed), resamples)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _means_of_resamples(sample: Floats, random: np.random.Generator, resamples: int) -> Floats:
    """In parts, so that many tasks do not need much memory."""
    rows = max(1, _CELLS_AT_ONCE // len(sample))
    parts = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(sample))
        parts.append(sample[random.integers(0, len(sample), shape)].mean(axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class PairedTest:
    """How two evaluations differ over the tasks that they share.

    Attributes:
        difference: mean over tasks of the second's value less the first's.
        interval: of the difference, by paired bootstrap; None = one task.
        p_value: how often a difference as large comes up when the two are equally good: the sign of each
            task's difference flipped at random (permutation test, two-sided).
        tasks: how many are shared.
        better: tasks on which the second is better; ``worse`` the other way round, the rest are equal.
        worse: see ``better``.
    """

    difference: float
    interval: Interval | None
    p_value: float
    tasks: int
    better: int
    worse: int

    @property
    def significant(self) -> bool:
        """Whether chance is an unlikely explanation, at the level of 5 %."""
        return self.p_value < 1 - LEVEL


def paired_test(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> PairedTest:
    """Compares the values of the same tasks, in the same order; the same seed gives the same result.

    Raises:
        EvaluationError: there is no task.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if not len(differences):
        raise EvaluationError("no task has answers in both evaluations: there is nothing to compare")
    return PairedTest(
        difference=float(differences.mean()),
        interval=bootstrap(differences.tolist(), seed, resamples),
        p_value=_sign_flips(differences, seed, resamples),
        tasks=len(differences),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )


def _sign_flips(differences: Floats, seed: int, resamples: int) -> float:
    # Equal tasks change no sum.
    sizes = np.abs(differences[differences != 0])
    if not len(sizes):
        return 1.0
    reached = abs(float(differences.sum())) * (1 - 1e-12)
    if len(sizes) <= _EXACT:
        bits = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
        return float((np.abs((2 * bits - 1) @ sizes) >= reached).mean())
    random = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // len(sizes))
    as_large = 0
    for start in range(0, resamples, rows):
        signs = random.integers(0, 2, (min(rows, resamples - start), len(sizes))) * 2 - 1
        as_large += int((np.abs(signs @ sizes) >= reached).sum())
    # What was seen is one of the possible outcomes too: never 0 (Phipson and Smyth 2010).
    return (as_large + 1) / (resamples + 1)
