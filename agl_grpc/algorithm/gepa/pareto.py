"""The Pareto front over tasks, and the choice of a parent from it (GEPA, algorithm 2)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

Scores = Mapping[str, Sequence[float]]
"""The reward of each task, by version; all of the same length."""


def frequencies(scores: Scores) -> dict[str, int]:
    """On how many tasks each version is among the best, without those that another one dominates.

    A version dominates another when it is nowhere worse and somewhere better.
    """
    tasks = range(len(next(iter(scores.values()))))
    highest = [max(row[task] for row in scores.values()) for task in tasks]
    wins = {version: sum(row[task] == highest[task] for task in tasks) for version, row in scores.items()}
    front = [version for version, count in wins.items() if count]
    return {
        version: wins[version]
        for version in front
        if not any(dominates(scores[other], scores[version]) for other in front if other != version)
    }


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one row of rewards is nowhere lower and somewhere higher than the other."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def choose(scores: Scores, choice: random.Random) -> str:
    """A version of the front, the likelier the more tasks it is best on."""
    counts = frequencies(scores)
    return choice.choices(list(counts), weights=list(counts.values()))[0]
