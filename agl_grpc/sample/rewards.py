"""Which reward counts for an attempt."""

from __future__ import annotations

from collections.abc import Iterable

from agl_grpc.v1.reward_pb2 import Reward

PRIMARY = "primary"


def final_reward(rewards: Iterable[Reward], name: str = PRIMARY) -> float | None:
    """The newest revision of the attempt's reward of that name (empty on the wire = primary), or None.

    Only rewards of the whole attempt count, not those of a span or a step. Of several graders the
    highest revision wins, then the latest time, then the last in the list.
    """
    newest: Reward | None = None
    for reward in rewards:
        whole = not reward.target_span_id and not reward.HasField("step")
        if not whole or (reward.name or PRIMARY) != name or not reward.HasField("value"):
            continue
        if newest is None or _age(reward) >= _age(newest):
            newest = reward
    return None if newest is None else newest.value


def rewarded_spans(rewards: Iterable[Reward]) -> frozenset[bytes]:
    """Ids of the spans that own a reward."""
    return frozenset(reward.target_span_id for reward in rewards if reward.target_span_id)


def _age(reward: Reward) -> tuple[int, int, int]:
    return reward.revision, reward.create_time.seconds, reward.create_time.nanos
