"""verl's rollout correction on whole and on split rollouts; the end-to-end tests run it.

Prints, for each configuration, the greatest difference between what a token gets as part of one row and of
two, how many tokens are rejected, and the range of the weights.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from agl_grpc.learner.batch.sequences import row_label
from agl_grpc.learner.credit.correction import correct_over_rollouts

ROLLOUTS, TOKENS = 12, 8
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "token": {"rollout_is": "token", "rollout_is_threshold": 1.2},
    "sequence": {"rollout_is": "sequence", "rollout_is_threshold": 1.5},
    "rejection": {"rollout_is": None, "rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.7_1.4"},
}


def batch(old: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, labels: list[str]) -> DataProto:
    return DataProto.from_dict(
        tensors={"old_log_probs": old, "rollout_log_probs": sampled, "response_mask": mask},
        non_tensors={"uid": np.array(labels, dtype=object)},
    )


def result(data: DataProto) -> torch.Tensor:
    """What each token is multiplied by: its weight, or 0 where it is rejected."""
    weights = data.batch.get("rollout_is_weights", torch.ones_like(data.batch["old_log_probs"]))
    product: torch.Tensor = weights * data.batch["response_mask"]
    return product


def compare(settings: dict[str, Any]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    sampled = -torch.rand(ROLLOUTS, TOKENS, generator=generator)
    old = sampled + 0.2 * torch.randn(ROLLOUTS, TOKENS, generator=generator)
    mask = torch.ones(ROLLOUTS, TOKENS, dtype=torch.int64)
    defaults = {"rollout_is_batch_normalize": False, "rollout_rs": None, "rollout_rs_threshold": None}
    config = OmegaConf.create({**defaults, "rollout_is_threshold": 2.0, **settings})
    labels = [row_label("g", number, 0) for number in range(ROLLOUTS)]
    theirs, _ = compute_rollout_correction_and_add_to_batch(batch(old, sampled, mask, labels), config)
    whole, metrics = correct_over_rollouts(batch(old, sampled, mask, labels), config)
    # Every rollout as two rows of half its tokens, second halves first, and a row of padding.
    half = TOKENS // 2
    parts = [(half, TOKENS, 1), (0, half, 0)]
    rows = [
        (old[:, start:end], sampled[:, start:end], mask[:, start:end], number) for start, end, number in parts
    ]
    pieces = [torch.cat([row[place] for row in rows]) for place in range(3)]
    padding = [torch.cat([piece, torch.zeros(1, half, dtype=piece.dtype)]) for piece in pieces]
    names = [row_label("g", number, part) for *_, part in rows for number in range(ROLLOUTS)]
    split, split_metrics = correct_over_rollouts(batch(*padding, [*names, "padding"]), config)
    again = result(split)[:-1]
    joined = torch.cat([again[ROLLOUTS:], again[:ROLLOUTS]], dim=1)
    found = result(whole)
    return {
        "to_verl": float((found - result(theirs)).abs().max()),
        "split": float((joined - found).abs().max()),
        "rejected": metrics["tokens/rejected"],
        "rejected_split": split_metrics["tokens/rejected"],
        "smallest": float(found.min()),
        "largest": float(found.max()),
    }


if __name__ == "__main__":
    print("\n" + json.dumps({name: compare(settings) for name, settings in CONFIGURATIONS.items()}))
