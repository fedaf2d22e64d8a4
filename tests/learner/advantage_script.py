"""Compares our estimators with verl's; the end-to-end tests run it in the learner environment.

Prints one JSON object: for each estimator the largest differences for whole, split and interrupted rollouts.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from agl_grpc.learner.credit.advantage import PREFIX, row_label
from agl_grpc.learner.verl.keys import OUTCOME_ESTIMATORS

GROUPS, SIZE, TOKENS = 3, 4, 6


def rewarded(scores: torch.Tensor) -> torch.Tensor:
    """Token-level rewards with each row's score at its end."""
    rewards = torch.zeros(len(scores), TOKENS)
    rewards[:, -1] = scores
    return rewards


def compare(name: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(GROUPS * SIZE, generator=generator)
    groups = [f"g{number // SIZE}" for number in range(GROUPS * SIZE)]
    config = OmegaConf.create({"gamma": 1.0, "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False})
    ours: Any = get_adv_estimator_fn(PREFIX + name)
    full = torch.ones(GROUPS * SIZE, TOKENS)
    index = np.array(groups, dtype=object)
    theirs, _ = get_adv_estimator_fn(name)(
        token_level_rewards=rewarded(scores), response_mask=full, index=index, config=config
    )

    labels = [row_label(group, number, 0) for number, group in enumerate(groups)]
    whole, _ = ours(rewarded(scores), full, config, index=np.array(labels, dtype=object))

    # Every second rollout in two rows, three of its tokens in each; the row order is shuffled.
    rows = [(n, part) for n in range(GROUPS * SIZE) for part in ((0, 1) if n % 2 else (None,))]
    rows = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    mask = torch.ones(len(rows), TOKENS)
    for place, (_, part) in enumerate(rows):
        if part is not None:
            mask[place, : TOKENS // 2] = float(part == 0)
            mask[place, TOKENS // 2 :] = float(part == 1)
    split_labels = [row_label(groups[n], n, part or 0) for n, part in rows]
    split, _ = ours(
        rewarded(scores[[n for n, _ in rows]]), mask, config, index=np.array(split_labels, dtype=object)
    )
    again = torch.zeros_like(full)
    for place, (n, _) in enumerate(rows):
        again[n] += split[place]

    # Observations between the turns, the reward on one of them at the end.
    gaps = torch.ones(GROUPS * SIZE, 2 * TOKENS)
    gaps[:, 1::2] = 0
    gap_rewards = torch.zeros_like(gaps)
    gap_rewards[:, -1] = scores
    interrupted, _ = ours(gap_rewards, gaps, config, index=np.array(labels, dtype=object))
    return {
        "whole": float((whole - theirs).abs().max()),
        "split": float((again - theirs).abs().max()),
        "interrupted": float((interrupted[:, ::2] - theirs).abs().max()),
        "masked": float(interrupted[:, 1::2].abs().max()),
        "size": float(theirs.abs().max()),
    }


if __name__ == "__main__":
    print("\n" + json.dumps({name: compare(name) for name in OUTCOME_ESTIMATORS}))
