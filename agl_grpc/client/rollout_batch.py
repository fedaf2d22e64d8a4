"""Batches of rollouts: enqueued, seen as they finish, never polled for; and what they were worth."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from agl_grpc.client.filters import rollout_filter
from agl_grpc.client.store_client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest, Failure, Rollout
from agl_grpc.model.reward import PRIMARY

LABEL = "batch"
_ENQUEUE_AT_ONCE = 500


class WatchEnded(RuntimeError):
    """The stream of rollouts ended before all of them had."""


async def run_rollouts(
    store: StoreClient, requests: Sequence[EnqueueRolloutRequest], *, label: str | None = None
) -> AsyncGenerator[Rollout, None]:
    """Enqueues rollouts and yields each as soon as it is finished (and judged, where the run names graders).

    Args:
        store: client of the run.
        requests: what to do. Those without ``rollout_id`` get ``LABEL.PLACE``.
        label: name of this batch of work within the run; None = a random one. Calling again with the same
            label and requests, also from another process, takes up what is there: rollouts that exist are not
            made again.

    The caller bounds the wait, with ``asyncio.timeout`` around the loop; see `cancel_rest`.
    """
    label = label or f"batch-{uuid.uuid4().hex[:12]}"
    wanted = [
        dataclasses.replace(
            request,
            rollout_id=request.rollout_id or f"{label}.{place}",
            labels={**(request.labels or {}), LABEL: label},
        )
        for place, request in enumerate(requests)
    ]
    mine = rollout_filter(run_id=store.run_id, labels={LABEL: label})
    there = {rollout.rollout_id for rollout in await store.query_rollouts(filter=mine)}
    missing = [request for request in wanted if request.rollout_id not in there]
    for start in range(0, len(missing), _ENQUEUE_AT_ONCE):
        await store.enqueue_many_rollouts(missing[start : start + _ENQUEUE_AT_ONCE])
    left = {request.rollout_id for request in wanted}
    if not left:
        return
    run = await store.get_run_by_id(store.run_id)
    judged = bool(run and run.graders)  # by others, who may take their time: such a rollout is sealed then
    changes = store.watch_rollouts(filter=mine, include_existing=True)
    async with contextlib.aclosing(changes):  # type: ignore[type-var]  # every watch is an async generator
        async for change in changes:
            for rollout in change.items:
                over = rollout.sealed if judged else rollout.status.is_terminal
                if over and rollout.rollout_id in left:
                    left.remove(rollout.rollout_id)
                    yield rollout
            if not left:
                return
    raise WatchEnded(f"the watch of rollouts ended with {len(left)} of {len(wanted)} unfinished")


async def cancel_rest(store: StoreClient, label: str) -> None:
    """Cancels what is unfinished of a batch of work, so that no worker goes on with it."""
    await store.cancel_rollouts(
        filter=rollout_filter(run_id=store.run_id, labels={LABEL: label}), reason="not waited for any longer"
    )


async def primary_rewards(store: StoreClient, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The reward that counts of each rollout that has one: of its latest attempt, and of no single step.

    Where the run names graders, their weighted sum counts; one that any of them has not judged has none.
    """
    return (await judgements(store, rollouts)).rewards


@dataclass(frozen=True)
class Judgements:
    """By rollout id: ``rewards`` that count, and, for those without one, why a grader gave none."""

    rewards: dict[str, float]
    failures: dict[str, Failure]


async def judgements(
    store: StoreClient, rollouts: Sequence[Rollout], weights: Mapping[str, float] | None = None
) -> Judgements:
    """What the latest attempts of rollouts are worth.

    Args:
        store: client of the run.
        rollouts: finished ones.
        weights: of named rewards, whose weighted sum counts; None = as the run says, else the primary one.
    """
    if not weights:
        run = await store.get_run_by_id(store.run_id)
        weights = (run.reward_weights if run else {}) or {PRIMARY: 1.0}
    last = {rollout.rollout_id: rollout.latest_attempt_id for rollout in rollouts}
    found: dict[str, dict[str, float]] = {}
    failures: dict[str, Failure] = {}
    for reward in await store.query_rewards([*last]):
        whole = reward.step is None and not reward.target_span_id
        if not whole or reward.attempt_id != last[reward.rollout_id] or reward.name not in weights:
            continue
        values = found.setdefault(reward.rollout_id, {})
        values.pop(reward.name, None)  # the one written last counts, and a failure is none
        if reward.value is not None:
            values[reward.name] = reward.value
        elif reward.failure is not None:
            failures[reward.rollout_id] = reward.failure
    rewards = {
        rollout_id: sum(weight * values[name] for name, weight in weights.items())
        for rollout_id, values in found.items()
        if len(values) == len(weights)
    }
    return Judgements(rewards, {name: each for name, each in failures.items() if name not in rewards})
