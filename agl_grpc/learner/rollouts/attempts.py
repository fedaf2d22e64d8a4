"""Sealed attempts read from the store, as what is trained of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeVar

from agl_grpc.client import StoreClient
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import AttemptedRollout, Rollout
from agl_grpc.sample import AttemptRecord, AttemptSamples, Decode, SampleRules, build_attempt, observe
from agl_grpc.v1 import reward_pb2, span_pb2
from agl_grpc.v1 import store_service_pb2 as store_pb2

T = TypeVar("T", span_pb2.StoredSpan, reward_pb2.Reward)


async def read_attempts(
    client: StoreClient,
    rollouts: Sequence[Rollout],
    rules: SampleRules,
    decode: Decode | None = None,
    frozen: Mapping[str, Sequence[Reward]] | None = None,
) -> list[AttemptSamples]:
    """The latest attempt of each rollout, in their order.

    Args:
        client: of the store that holds them.
        rollouts: sealed ones, with their attempts where it is to count that a capture is incomplete.
        rules: what is trained of an attempt.
        decode: text of tokens, by which breaks between rows are told apart.
        frozen: rewards by rollout that count in place of those that the store has now.
    """
    ids = [rollout.rollout_id for rollout in rollouts]
    spans, rewards = await asyncio.gather(_spans(client, ids), _rewards(client, ids))
    held = {name: [reward.to_proto() for reward in kept] for name, kept in (frozen or {}).items()}
    spans_at, rewards_at = _by_place(spans), _by_place(rewards)
    made = []
    for rollout in rollouts:
        place = (rollout.rollout_id, rollout.latest_attempt_id or "")
        counting = rewards_at
        if rollout.rollout_id in held:
            counting = _by_place(held[rollout.rollout_id])
        record = AttemptRecord(
            rollout_id=place[0],
            attempt_id=place[1],
            group_id=rollout.group_id or "",
            spans=spans_at.get(place, []),
            rewards=counting.get(place, []),
            capture_incomplete=isinstance(rollout, AttemptedRollout) and rollout.attempt.capture_incomplete,
        )
        samples = build_attempt(record, rules, decode)
        samples.facts = observe(record, rules)
        made.append(samples)
    return made


def _by_place(items: Sequence[T]) -> dict[tuple[str, str], list[T]]:
    """Spans or rewards by rollout and attempt, in their order."""
    found: dict[tuple[str, str], list[T]] = {}
    for item in items:
        found.setdefault((item.rollout_id, item.attempt_id), []).append(item)
    return found


async def _spans(client: StoreClient, ids: list[str]) -> list[span_pb2.StoredSpan]:
    spans = client.export_spans(rollout_ids=ids, model_calls_only=True, sealed_only=True, delta_prompts=True)
    return [span async for span in spans]


async def _rewards(client: StoreClient, ids: list[str]) -> list[reward_pb2.Reward]:
    request = store_pb2.ListRewardsRequest(rollout_ids=ids)
    return await client.read_all(client.bound.store.ListRewards, request, lambda page: page.rewards)
