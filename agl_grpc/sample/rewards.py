"""Which rewards count for an attempt, and which of its answers they are credited to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agl_grpc.sample.types import SampleRules
from agl_grpc.v1.reward_pb2 import Reward

PRIMARY = "primary"


@dataclass(slots=True)
class Judgement:
    """What the newest revisions of an attempt's rewards say.

    value: the attempt's reward by the rules; None = it has none. own: the part of it that judges the attempt
    as a whole. named: rewards of the whole attempt by name, those that do not count too. by_span and by_step:
    rewards that count, of single calls by span id and of steps by number. failed: rewards that count and that
    their graders failed to give.
    """

    value: float | None = None
    own: float = 0.0
    named: dict[str, float] = field(default_factory=dict)
    by_span: dict[bytes, float] = field(default_factory=dict)
    by_step: dict[int, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)


def judge(rewards: Sequence[Reward], rules: SampleRules) -> Judgement:
    """The judgement of an attempt.

    Of one name and target the highest revision counts, then the latest time, then the last in the list. The
    attempt's reward is the one named by the rules (or the weighted sum of several); an attempt that was
    judged only by its steps or calls has their sum.
    """
    if not rules.reward_weights and len(rewards) == 1 and _plain(rewards[0], rules.reward_name):
        # As most attempts are: one reward, of the whole attempt.
        value = rewards[0].value
        # Added up as weighted sums are: a negative zero becomes a zero.
        return Judgement(0.0 + value, 0.0 + value, {rules.reward_name: value})
    newest: dict[tuple[str, bytes, int | None], Reward] = {}
    for reward in rewards:
        if reward.HasField("value") or reward.HasField("failure"):
            step = reward.step if reward.HasField("step") else None
            key = (reward.name or PRIMARY, reward.target_span_id, step)
            if key not in newest or _age(reward) >= _age(newest[key]):
                newest[key] = reward
    counted = rules.counted_rewards
    found = Judgement()
    for (name, span_id, step), reward in newest.items():
        if reward.HasField("failure"):
            found.failed.update({name} & counted.keys() or _parts_of(name, counted))
        elif not span_id and step is None:
            found.named[name] = reward.value
        elif name in counted and span_id:
            found.by_span[span_id] = found.by_span.get(span_id, 0.0) + counted[name] * reward.value
        elif name in counted and step is not None:
            found.by_step[step] = found.by_step.get(step, 0.0) + counted[name] * reward.value
    _settle(found, counted)
    return found


def _plain(reward: Reward, name: str) -> bool:
    """Whether a reward is the whole attempt's, by this name."""
    of_part = reward.target_span_id or reward.HasField("step") or reward.HasField("failure")
    return (reward.name or PRIMARY) == name and reward.HasField("value") and not of_part


def _parts_of(grader: str, counted: Mapping[str, float]) -> set[str]:
    """Components that count of a grader, none of which is there when it has failed."""
    return {name for name in counted if name.startswith(f"{grader}/")}


def _settle(found: Judgement, counted: Mapping[str, float]) -> None:
    given = [name for name in counted if name in found.named]
    if len(given) == len(counted):
        found.value = found.own = sum(weight * found.named[name] for name, weight in counted.items())
    elif not given and (parts := [*found.by_span.values(), *found.by_step.values()]):
        found.value = math.fsum(parts)


def final_reward(rewards: Iterable[Reward], name: str = PRIMARY) -> float | None:
    """The newest revision of the attempt's reward of that name (empty on the wire = primary), or None.

    Only rewards of the whole attempt count, not those of a span or a step.
    """
    return judge([*rewards], SampleRules(reward_name=name)).named.get(name)


def rewarded_spans(rewards: Iterable[Reward]) -> frozenset[bytes]:
    """Ids of the spans that own a reward."""
    return frozenset(reward.target_span_id for reward in rewards if reward.target_span_id)


def credit(
    span_ids: Sequence[bytes], judgement: Judgement, discount: float
) -> tuple[list[tuple[float, float]], int]:
    """Reward and return of each trained answer, and how many rewards belong to none of them.

    Args:
        span_ids: the calls of the attempt's trained answers in call order: answer k is step k.
        judgement: the attempt's rewards.
        discount: factor for each answer between a reward and an earlier answer.

    The attempt's own reward comes with its last answer, undiscounted there. Each of several answers of one
    call has the call's reward.
    """
    if not judgement.by_step and not judgement.by_span:
        # As nearly all attempts are: the end's reward, discounted back.
        returns = [judgement.own] * len(span_ids)
        for place in range(len(returns) - 2, -1, -1):
            returns[place] = discount * returns[place + 1]
        return [(0.0, each) for each in returns], 0
    own = [
        judgement.by_step.get(step, 0.0) + judgement.by_span.get(span_id, 0.0)
        for step, span_id in enumerate(span_ids)
    ]
    known = set(span_ids)
    unplaced = sum(span_id not in known for span_id in judgement.by_span)
    unplaced += sum(step >= len(span_ids) for step in judgement.by_step)
    ahead = judgement.own
    result: list[tuple[float, float]] = []
    for reward in reversed(own):
        ahead = reward + (discount * ahead if result else ahead)
        result.append((reward, ahead))
    return result[::-1], unplaced


def _age(reward: Reward) -> tuple[int, int, int]:
    return reward.revision, reward.create_time.seconds, reward.create_time.nanos
