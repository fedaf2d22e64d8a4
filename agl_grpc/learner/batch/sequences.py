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
        order = torch.tensor([row for rows in self.rows.values() for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(rows) for rows in self.rows.values()], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        row_at, token_at = mask.bool()[order].nonzero(as_tuple=True)
        rollout = owner[row_at]
        counts = torch.bincount(rollout, minlength=len(lengths))
        before = torch.cumsum(counts, dim=0) - counts
        # Of every trained token, rollout by rollout: where it is in the rows, and where in the sequences.
        self._in_rows = (order[row_at], token_at)
        self._in_sequences = (rollout, torch.arange(len(rollout)) - before[rollout])
        self.counts: list[int] = counts.tolist()
        self._shape = (len(self.counts), max(1, *self.counts) if self.counts else 1)
        self._rows_shape = mask.shape

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
        flat[self._in_sequences] = values[self._in_rows]
        return flat

    def scatter(self, flat: torch.Tensor) -> torch.Tensor:
        """The inverse of ``gather``, shape (rows, tokens); 0 where nothing is trained."""
        values = flat.new_zeros(self._rows_shape)
        values[self._in_rows] = flat[self._in_sequences]
        return values
