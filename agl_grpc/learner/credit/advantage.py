"""verl's advantage estimators over rollouts instead of rows.

verl's estimators count rows: a rollout that needs two rows would weigh twice, and turns before an observation
are forgotten by some. Each supported estimator is registered again as ``agl_NAME``: the trained tokens of a
rollout, over all its rows, become one sequence with the reward at its end, verl's own estimator works on
these sequences, and its advantages go back to the tokens they belong to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est

from agl_grpc.learner.batch.sequences import SEPARATOR, RolloutSequences
from agl_grpc.learner.batch.sequences import label_group as label_group
from agl_grpc.learner.batch.sequences import row_label as row_label
from agl_grpc.learner.credit.turn_credit import advantages_by_rollout
from agl_grpc.learner.errors import ConfigError, FidelityError
from agl_grpc.learner.rollouts.groups import FinishedRollout
from agl_grpc.learner.verl.keys import OUTCOME_ESTIMATORS

PREFIX = "agl_"

Advantages = tuple[torch.Tensor, torch.Tensor]


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
    sequences = RolloutSequences(labels, mask)
    if sequences.several and config.get("use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward needs rollouts of one row each: set it to False, or use "
            "actor_rollout_ref.actor.use_kl_loss"
        )
    flat_mask = sequences.gather(mask)
    flat_rewards = sequences.gather(rewards) if not sequences.several else torch.zeros_like(flat_mask)
    flat_rewards = flat_rewards.to(rewards.dtype)
    # What lies beyond trained tokens (a reward on an observation at the end) counts at the end.
    last = torch.tensor([rows[-1] for rows in sequences.rows.values()], dtype=torch.int64)
    ends = torch.tensor(sequences.counts, dtype=torch.int64).sub(1).clamp(min=0)
    beyond = rewards[last].sum(dim=1) - flat_rewards.sum(dim=1)
    flat_rewards[torch.arange(len(ends)), ends] += beyond
    options = {"index": sequences.groups, "config": config}
    if "norm_adv_by_std_in_grpo" in inspect.signature(estimator).parameters:
        options["norm_adv_by_std_in_grpo"] = config.get("norm_adv_by_std_in_grpo", True)
    advantages, returns = estimator(token_level_rewards=flat_rewards, response_mask=flat_mask, **options)
    return sequences.scatter(advantages.to(rewards.dtype)), sequences.scatter(returns.to(rewards.dtype))


def credit_turns(
    labels: Sequence[str],
    rollout_ids: Sequence[str],
    mask: torch.Tensor,
    rollout_of: Callable[[str], FinishedRollout],
    *,
    by_deviation: bool,
) -> torch.Tensor:
    """Advantages of ``grpo_turns``, shape (rows, tokens): each trained token has that of its answer.

    Args:
        labels: ``row_label`` of each row; padding rows have none, and get zeros.
        rollout_ids: the rollout of each row.
        mask: 1 where a token is trained, shape (rows, tokens).
        rollout_of: the rollout of an id, with the turns of its rows.
        by_deviation: whether to divide by the group's standard deviation.
    """
    groups = {
        name: label_group(label)
        for name, label in zip(rollout_ids, labels, strict=True)
        if SEPARATOR in label
    }
    rollouts = {name: rollout_of(name) for name in groups}
    returns = {name: [turn[2] for row in each.rows for turn in row.turns] for name, each in rollouts.items()}
    found = advantages_by_rollout(groups, returns, by_deviation=by_deviation)
    advantages = torch.zeros(mask.shape, dtype=torch.float32)
    for place, (name, label) in enumerate(zip(rollout_ids, labels, strict=True)):
        if SEPARATOR not in label:
            continue
        rows, number = rollouts[name].rows, int(label.rpartition(SEPARATOR)[2])
        before = sum(len(row.turns) for row in rows[:number])
        for turn, (start, end, _) in enumerate(rows[number].turns):
            advantages[place, start:end] = found[name][before + turn]
    return advantages * mask


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
