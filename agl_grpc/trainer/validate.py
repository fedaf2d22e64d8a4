"""Validation by rollouts: the same workers and the same engine as training, never trained."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.algorithm.rollouts import WatchEnded, primary_rewards, run_rollouts
from agl_grpc.client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest, FailureKind, Rollout, RolloutConfig, RolloutMode
from agl_grpc.trainer.errors import TrainerError

# Before the training rollouts that may wait in the same workers' queues.
_PRIORITY = 10


@dataclass(frozen=True)
class Score:
    """What a pass over a dataset came to.

    Attributes:
        mean: mean reward over all rollouts; a rollout without a reward counts as 0.
        rollouts: how many there were: tasks times samples.
        tasks: how many tasks.
        failures: rollouts that ended without a reward, by kind of failure.
        seconds: how long the pass took.
        task_means: mean reward of each task, in the dataset's order.
    """

    mean: float
    rollouts: int
    tasks: int
    seconds: float
    failures: dict[str, int] = field(default_factory=dict)
    task_means: tuple[float, ...] = ()


async def validate(
    store: StoreClient,
    tasks: Sequence[Any],
    *,
    resources_id: str | None = None,
    samples: int = 1,
    queue: str | None = None,
    config: RolloutConfig | None = None,
    timeout: float = 1800.0,  # noqa: ASYNC109  # the whole pass, not one call
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Score:
    """Has each task answered ``samples`` times by the run's workers, in mode ``val``, and reads the rewards.

    Args:
        store: client of the run.
        tasks: the dataset; each item is a rollout's input.
        resources_id: what the agents work with, sampling parameters included; None = the run's latest.
        samples: rollouts for each task.
        queue: queue of the rollouts; None = the run's own. The workers must serve it.
        config: rules of each rollout's life.
        timeout: seconds for the whole pass.
        on_progress: told how many rollouts are finished, of how many.

    Raises:
        TrainerError: not finished in time, or every rollout failed for reasons that are not the agent's.
    """
    began = time.monotonic()
    label = f"validation-{uuid.uuid4().hex[:12]}"
    requests = [
        EnqueueRolloutRequest(
            input=task,
            mode=RolloutMode.VAL,
            resources_id=resources_id,
            config=config,
            rollout_id=f"{label}.{number}.{sample}",
            group_id=f"{label}.{number}",
            queue=queue,
            priority=_PRIORITY,
        )
        for number, task in enumerate(tasks)
        for sample in range(samples)
    ]
    ended = await _finished(store, label, requests, timeout, on_progress)
    return await _score(store, ended, [request.rollout_id or "" for request in requests], samples, began)


async def _finished(
    store: StoreClient,
    label: str,
    requests: Sequence[EnqueueRolloutRequest],
    seconds: float,
    on_progress: Callable[[int, int], None],
) -> dict[str, Rollout]:
    ended: dict[str, Rollout] = {}
    rollouts = run_rollouts(store, requests, label=label)
    try:
        async with asyncio.timeout(seconds), contextlib.aclosing(rollouts):
            async for rollout in rollouts:
                ended[rollout.rollout_id] = rollout
                on_progress(len(ended), len(requests))
    except TimeoutError as error:
        raise TrainerError(
            f"validation: {len(ended)} of {len(requests)} rollouts were finished after {seconds:g} s; "
            "are there workers, and does the engine answer?"
        ) from error
    except WatchEnded as error:
        raise TrainerError(f"validation: {error}") from error
    return ended


async def _score(
    store: StoreClient, ended: dict[str, Rollout], ids: Sequence[str], samples: int, began: float
) -> Score:
    rewards = await primary_rewards(store, [*ended.values()])
    failures: Counter[str] = Counter()
    for rollout_id in ids:
        if rollout_id not in rewards:
            failure = ended[rollout_id].failure
            failures[failure.kind.value if failure and failure.kind else "no_reward"] += 1
    if ids and failures[FailureKind.INFRASTRUCTURE.value] == len(ids):
        failure = ended[ids[0]].failure
        raise TrainerError(f"validation: no rollout got as far as an answer: {failure and failure.message}")
    values = [rewards.get(rollout_id, 0.0) for rollout_id in ids]
    means = tuple(sum(values[at : at + samples]) / samples for at in range(0, len(values), samples))
    return Score(
        mean=sum(values) / len(values) if values else 0.0,
        rollouts=len(values),
        tasks=len(means),
        seconds=time.monotonic() - began,
        failures=dict(failures),
        task_means=means,
    )
