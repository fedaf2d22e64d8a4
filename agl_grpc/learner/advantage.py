"""verl's advantage estimators over rollouts instead of rows.

verl's estimators count rows: a rollout that needs two rows would weigh twice, and turns before an observation
are forgotten by some. Each supported estimator is registered again as ``agl_NAME``: the trained tokens of a
rollout, over all its rows, become one sequence with the reward at its end, verl's own estimator works on
these sequences, and its advantages go back to the tokens they belong to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est

from agl_grpc.learner.errors import ConfigError, FidelityError

PREFIX = "agl_"
# Those that judge a rollout by its outcome; gae works on values and stays verl's own.
OUTCOME_ESTIMATORS = (
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "opo",
    "gpg",
    "grpo_passk",
)
_SEPARATOR = "|"

Advantages = tuple[torch.Tensor, torch.Tensor]


def row_label(group: str, rollout: int, row: int) -> str:
    """What verl carries as ``uid`` of a row: its group, its rollout's number, its own number."""
    return _SEPARATOR.join((group, str(rollout), str(row)))


def label_group(label: str) -> str:
    """The group of a row."""
    return label.rsplit(_SEPARATOR, 2)[0]


def _rollouts(labels: np.ndarray[Any, Any]) -> dict[str, list[int]]:
    """Positions of every rollout's rows, in the order of the rows; padding rows belong to none."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for position, label in enumerate(labels):
        group, separator, row = str(label).rpartition(_SEPARATOR)
        if separator:
            rows.setdefault(group, []).append((int(row), position))
    return {rollout: [position for _, position in sorted(places)] for rollout, places in rows.items()}


def over_rollouts(
    estimator: Callable[..., Advantages],
    rewards: torch.Tensor,
    mask: torch.Tensor,
    labels: np.ndarray[Any, Any],
    config: Any,
) -> Advantages:
    """Advantages and returns of all rows, shape (rows, tokens), 0 where the mask is 0.

    Args:
        estimator: verl's, over one sequence a rollout.
        rewards: token-level rewards, shape (rows, tokens); every row carries its rollout's reward at its end.
        mask: 1 where a token is trained, same shape.
        labels: ``row_label`` of each row.
        config: verl's ``algorithm`` section.
    """
    rollouts = _rollouts(labels)
    several = any(len(rows) > 1 for rows in rollouts.values())
    if several and config.get("use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward needs rollouts of one row each: set it to False, or use "
            "actor_rollout_ref.actor.use_kl_loss"
        )
    trained = mask.bool()
    length = max(1, int(max((trained[rows].sum() for rows in rollouts.values()), default=torch.tensor(1))))
    flat_rewards = rewards.new_zeros(len(rollouts), length)
    flat_mask = mask.new_zeros(len(rollouts), length)
    for place, rows in enumerate(rollouts.values()):
        tokens = int(trained[rows].sum())
        last = rewards[rows[-1]]
        end = max(0, tokens - 1)
        if not several:
            flat_rewards[place, :tokens] = last[trained[rows[-1]]]
        # What lies beyond trained tokens (a reward on an observation at the end) counts at the end.
        flat_rewards[place, end] += last.sum() - flat_rewards[place].sum()
        flat_mask[place, :tokens] = 1
    groups = np.array([rollout.rpartition(_SEPARATOR)[0] for rollout in rollouts], dtype=object)
    options = {"index": groups, "config": config}
    if "norm_adv_by_std_in_grpo" in inspect.signature(estimator).parameters:
        options["norm_adv_by_std_in_grpo"] = config.get("norm_adv_by_std_in_grpo", True)
    advantages, returns = estimator(token_level_rewards=flat_rewards, response_mask=flat_mask, **options)
    spread = (torch.zeros_like(rewards), torch.zeros_like(rewards))
    for place, rows in enumerate(rollouts.values()):
        start = 0
        for row in rows:
            count = int(trained[row].sum())
            for target, source in zip(spread, (advantages, returns), strict=True):
                target[row, trained[row]] = source[place, start : start + count].to(target.dtype)
            start += count
    return spread


def _register(name: str) -> None:
    estimator = get_adv_estimator_fn(name)

    @register_adv_est(PREFIX + name)  # type: ignore[untyped-decorator]  # verl is untyped
    def wrapped(
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        config: Any,
        index: np.ndarray[Any, Any] | None = None,
        **_unused: Any,
    ) -> Advantages:
        if index is None:
            raise FidelityError("rows reached the advantage estimator without group and rollout")
        with torch.no_grad():
            return over_rollouts(estimator, token_level_rewards, response_mask, index, config)


for _name in OUTCOME_ESTIMATORS:
    _register(_name)
