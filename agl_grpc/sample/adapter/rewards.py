"""Which call a reward is given to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum

from agl_grpc.sample.adapter.tree import Node


class RewardMatchPolicy(StrEnum):
    """How rewards find their calls."""

    FIRST_OCCURRENCE = "first_occurrence"
    """In time: to the last call before it that has none yet."""
    FIRST_SIBLING = "first_sibling"
    """The same, among the children of one span only."""


def match_rewards(root: Node, policy: RewardMatchPolicy, calls: Collection[Node]) -> dict[str, float]:
    """The rewards of calls by their spans' ids; one that finds no call is given to nobody."""
    wanted = {id(call) for call in calls}
    rewards: dict[str, float] = {}
    if policy is RewardMatchPolicy.FIRST_OCCURRENCE:
        _assign(sorted(root.walk(), key=lambda node: node.start), wanted, rewards)
    else:
        for node in root.walk():
            _assign(node.children, wanted, rewards)
    return rewards


def _assign(nodes: Iterable[Node], wanted: Collection[int], rewards: dict[str, float]) -> None:
    calls: list[Node] = []
    for node in nodes:
        if id(node) in wanted:
            calls.append(node)
        reward = node.reward()
        if reward is None:
            continue
        # A call that was still under way when the reward was given did not earn it.
        free = (call for call in reversed(calls) if call.end <= node.start and call.id not in rewards)
        earner = next(free, None)
        if earner is not None:
            rewards[earner.id] = reward
