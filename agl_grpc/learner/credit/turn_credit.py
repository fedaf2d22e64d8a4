"""Credit by turn: each answer of a rollout is judged by its own return, within its group.

`grpo_turns` is GRPO with process rewards (DeepSeekMath, arXiv 2402.03300, section 4.1.3) over the turn
returns that samples carry: an answer's own reward, and discounted all later ones of its rollout. A turn's
advantage is its return minus the group's mean, over the group's standard deviation. In both a rollout weighs
the same however many turns it has, so without step rewards (and undiscounted) this is plain GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

NAME = "grpo_turns"
# verl's, so that rollouts of one turn get verl's advantages.
_EPSILON = 1e-6


def normalised_returns(
    rollouts: Sequence[Sequence[float]], *, by_deviation: bool = True
) -> list[list[float]]:
    """The advantage of every turn of a group's rollouts.

    Args:
        rollouts: of each rollout the returns of its turns; a rollout without turns has no part in it.
        by_deviation: whether to divide by the standard deviation (`algorithm.norm_adv_by_std_in_grpo`).
    """
    counted = [returns for returns in rollouts if returns]
    if len(counted) < 2:
        # Nothing to compare with: verl's GRPO would train with the bare reward.
        return [[0.0] * len(returns) for returns in rollouts]
    mean = math.fsum(math.fsum(returns) / len(returns) for returns in counted) / len(counted)
    spread = math.fsum(math.fsum((each - mean) ** 2 for each in r) / len(r) for r in counted)
    scale = math.sqrt(spread / (len(counted) - 1)) + _EPSILON if by_deviation else 1.0
    return [[(each - mean) / scale for each in returns] for returns in rollouts]


def advantages_by_rollout(
    groups: Mapping[str, str], returns: Mapping[str, Sequence[float]], *, by_deviation: bool = True
) -> dict[str, list[float]]:
    """The advantage of every turn, by rollout.

    Args:
        groups: the group of each rollout.
        returns: the returns of each rollout's turns.
        by_deviation: as in `normalised_returns`.
    """
    members: dict[str, list[str]] = {}
    for rollout, group in groups.items():
        members.setdefault(group, []).append(rollout)
    found: dict[str, list[float]] = {}
    for names in members.values():
        group_returns = [returns[name] for name in names]
        found.update(zip(names, normalised_returns(group_returns, by_deviation=by_deviation), strict=True))
    return found
