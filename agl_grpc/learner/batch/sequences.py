"""Rollouts as sequences: the trained tokens of a rollout, over all its rows, one after the other.

verl computes over rows. What belongs to a rollout (its advantage, its importance weight, whether it is
rejected) is computed on these sequences and goes back to the tokens of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SEPARATOR = "|"


def row_label(group: str, rollout: int, row: int) -> str:
    """What verl carries as ``uid`` of a row: its group, its rollout's number, its own number."""
    return SEPARATOR.join((group, str(rollout), str(row)))


def label_group(label: str) -> str:
    """The group of a row."""
    return label.rsplit(SEPARATOR, 2)[0]


def _rollouts(labels: np.ndarray[Any, Any]) -> dict[str, list[int]]:
    """Positions of every rollout's rows, in the order of the rows; padding rows belong to none."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for position, label in enumerate(labels):
        rollout, separator, row = str(label).rpartition(SEPARATOR)
        if separator:
            rows.setdefault(rollout, []).append((int(row), position))
    return {rollout: [position for _, position in sorted(places)] for rollout, places in rows.items()}


class RolloutSequences:
    """Rows of tokens as one sequence a rollout, and back.

    Args:
        labels: ``row_label`` of each row.
        mask: 1 where a token is trained, shape (rows, tokens).
    """

    def __init__(self, labels: np.ndarray[Any, Any], mask: torch.Tensor) -> None:
        self.rows = _rollouts(labels)
        self._trained = mask.bool()
        counts = [int(self._trained[rows].sum()) for rows in self.rows.values()]
        self.counts = counts
        self._shape = (len(counts), max(1, *counts) if counts else 1)

    @property
    def several(self) -> bool:
        """Whether a rollout has more than one row."""
        return any(len(rows) > 1 for rows in self.rows.values())

    @property
    def groups(self) -> np.ndarray[Any, Any]:
        """The group of each rollout."""
        return np.array([rollout.rpartition(SEPARATOR)[0] for rollout in self.rows], dtype=object)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the trained tokens, shape (rollouts, longest); 0 beyond a rollout's end."""
        flat = values.new_zeros(self._shape)
        for place, rows in enumerate(self.rows.values()):
            flat[place, : self.counts[place]] = torch.cat([values[row][self._trained[row]] for row in rows])
        return flat

    def scatter(self, flat: torch.Tensor) -> torch.Tensor:
        """The inverse of ``gather``, shape (rows, tokens); 0 where nothing is trained."""
        values = flat.new_zeros(self._trained.shape)
        for place, rows in enumerate(self.rows.values()):
            start = 0
            for row in rows:
                count = int(self._trained[row].sum())
                values[row, self._trained[row]] = flat[place, start : start + count]
                start += count
        return values
