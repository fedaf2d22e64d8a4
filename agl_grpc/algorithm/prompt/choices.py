"""Choices made from a seed, so that a resumed run makes them again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def seeded(seed: int, *place: object) -> random.Random:
    """A generator for one decision of a run."""
    return random.Random("/".join(map(str, (seed, *place))))


def batch(dataset: Sequence[Any], size: int, number: int, seed: int, purpose: str) -> dict[int, Any]:
    """The ``number``-th batch (from 0) of tasks by their place in the dataset.

    The dataset is walked through again and again, in a new order each time; one that is not larger than
    ``size`` is a batch by itself. The last batch of a round may be smaller.
    """
    if size >= len(dataset):
        return dict(enumerate(dataset))
    batches = -(-len(dataset) // size)
    epoch, place = divmod(number, batches)
    order = list(range(len(dataset)))
    seeded(seed, purpose, epoch).shuffle(order)
    return {index: dataset[index] for index in order[place * size : (place + 1) * size]}
