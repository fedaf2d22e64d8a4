"""The choices of beam search."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence


def parents(beam: Sequence[str], width: int, choice: random.Random) -> list[str]:
    """``width`` versions to branch from: a sample of a larger beam, a smaller one repeated in turn."""
    if len(beam) > width:
        return choice.sample(list(beam), width)
    return [beam[place % len(beam)] for place in range(width)]


def best(scores: Mapping[str, float], width: int) -> list[str]:
    """The ``width`` best versions, the best first; of equal ones the earlier."""
    order = list(scores)
    return sorted(order, key=lambda version: (-scores[version], order.index(version)))[:width]
