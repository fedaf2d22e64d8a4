"""Rejection sampling: which rollouts of every group are good enough to be learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """A rollout, the group in which it is compared, and its reward."""

    rollout_id: str
    group_id: str
    reward: float


def best_of_groups(judged: Iterable[Judged], keep: int, min_reward: float) -> list[str]:
    """Ids of the ``keep`` best rollouts of every group (0 = all), of equals the first, in the groups' order.

    A rollout with less than ``min_reward`` is never among them.
    """
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        if each.reward >= min_reward:
            groups.setdefault(each.group_id, []).append(each)
    ordered = (sorted(group, key=lambda each: -each.reward) for group in groups.values())
    return [each.rollout_id for group in ordered for each in group[: keep or None]]
