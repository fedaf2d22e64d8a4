"""Validation during training: the same evaluation as `agl-grpc eval`, by the run's own workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.evaluation import Evaluation, EvaluationError, Pass, Sampling, evaluate, publish_sampling
from agl_grpc.learner.errors import ConfigError, DeadlineError, LearnerError
from agl_grpc.learner.stopping import Waits
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model import LLM

# The mean reward of a whole pass: by it the best checkpoint is chosen.
SCORE = "val-aux/reward/mean"
_TAKE_UP_SECONDS = 0.5


class StoreValidation:
    """Has the validation tasks done in mode ``val``, with sampling parameters of their own.

    Args:
        link: the line to the store.
        prefix: begins the ids of resources and rollouts: the training run and its epoch.
        plan: how; its label is made for each step.
        note: told step and mean reward; answers whether that step's checkpoint is to be kept.
        models: the trained models; endpoints of theirs sample as validation says.
    """

    def __init__(
        self,
        link: StoreLink,
        prefix: str,
        plan: Pass,
        note: Callable[[int, float], bool],
        *,
        models: Collection[str] = (),
    ) -> None:
        self._models = models
        self._link = link
        self._prefix = prefix
        self._plan = plan
        self._note = note

    def run(self, step: int, tasks: Iterable[Any]) -> tuple[dict[str, float], bool]:
        """Scores the weights that the engines serve after ``step``.

        Returns:
            metrics under verl's names, and whether the step's checkpoint is to be kept.

        Raises:
            LearnerError: the pass did not come to an end, or no rollout got as far as an answer.
        """
        try:
            found = self._link.run(self._evaluate(step, list(tasks)))
        except EvaluationError as error:
            raise LearnerError(f"validation after step {step}: {error}") from error
        keep = step > 0 and not math.isnan(found.mean) and self._note(step, found.mean)
        return metrics_of(found), keep

    async def _evaluate(self, step: int, tasks: Sequence[Any]) -> Evaluation:
        client = self._link.client
        plan = dataclasses.replace(self._plan, label=f"{self._prefix}.validation.{step}")
        resources_id = await self._resources(client)
        return await evaluate(client, tasks, plan, resources_id=resources_id)

    async def _resources(self, client: StoreClient) -> str | None:
        """What agents work with: the run's latest resources, sampled as validation says.

        They are published once; the latest are published again after them, so that training goes on with
        those.
        """
        resources_id = f"{self._prefix}-validation"
        if await client.get_resources_by_id(resources_id) is not None:
            return resources_id
        latest = await client.get_latest_resources()
        if latest is None:
            return None
        models = {name: value.model for name, value in latest.resources.items() if isinstance(value, LLM)}
        if not models:
            return None
        # A model may be served under another name than it is trained: then the first endpoint is meant.
        endpoints = [name for name, model in models.items() if model in self._models] or list(models)[:1]
        await publish_sampling(client, resources_id, latest.resources, endpoints, self._plan.sampling)
        await client.update_resources(latest.resources_id, latest.resources)
        return resources_id


class FollowedValidation:
    """The scores of another training run's validation: that run leads, and has all models' weights judged.

    Args:
        link: the line to the store.
        leader: the training run that validates, after the same steps as this one asks.
        note: told step and mean reward; answers whether that step's checkpoint is to be kept.
        waits: ends the wait for a score when this training run is asked to stop.
        deadline: seconds to wait for a score.
    """

    def __init__(
        self,
        link: StoreLink,
        leader: str,
        note: Callable[[int, float], bool],
        *,
        waits: Waits,
        deadline: float,
    ) -> None:
        self._client = link.client
        self._leader = leader
        self._note = note
        self._waits = waits
        self._deadline = deadline

    def run(self, step: int, _tasks: Iterable[Any]) -> tuple[dict[str, float], bool]:
        """The score of the weights after ``step``, once the leader has reported the step.

        Returns:
            the score as a metric, and whether the step's checkpoint is to be kept.

        Raises:
            ConfigError: before the first step, for which no leader reports.
            DeadlineError: the leader did not report the step in time.
        """
        if step == 0:
            raise ConfigError(
                "a training run that follows another cannot validate before training: set "
                "trainer.val_before_train in the run that leads"
            )
        score = self._waits.until(self._reported(step))
        if score is None:
            return {}, False
        return {SCORE: score}, self._note(step, score)

    async def _reported(self, step: int) -> float | None:
        """What the leader says of a step; None = nothing was judged."""
        try:
            async with asyncio.timeout(self._deadline):
                while True:
                    changes = self._client.watch_training_run(self._leader, from_step=step)
                    async with contextlib.aclosing(changes):
                        async for _, steps in changes:
                            for item in steps:
                                if item.step == step:
                                    return item.metrics.get(SCORE)
                    # The end that the watch has shown is the one that is being resumed.
                    await asyncio.sleep(_TAKE_UP_SECONDS)
        except TimeoutError as error:
            raise DeadlineError(
                f"training run {self._leader}, which this one follows, did not report step {step} with its "
                f"validation within {self._deadline:g} s"
            ) from error


def metrics_of(found: Evaluation) -> dict[str, float]:
    """The figures of each data source: the mean under verl's name, the rest beside it."""
    metrics: dict[str, float] = {}
    for source, figures in found.sources.items():
        if figures.mean is not None:
            metrics[f"val-core/{source}/reward/mean@{found.samples}"] = figures.mean
        if figures.interval is not None:
            metrics[f"val-aux/{source}/reward/low"] = figures.interval.low
            metrics[f"val-aux/{source}/reward/high"] = figures.interval.high
        for k, value in figures.pass_at.items():
            if value is not None:
                metrics[f"val-aux/{source}/pass@{k}"] = value
    if not math.isnan(found.mean):
        metrics[SCORE] = found.mean
    failed = {f"val-aux/failures/{kind}": float(count) for kind, count in found.failures.items()}
    return {**metrics, "val-aux/rollouts": float(found.figures.rollouts), **failed}


def sampling_of(val_kwargs: Any, max_tokens: int | None, seed: int) -> Sampling:
    """verl's own sampling parameters of validation: ``actor_rollout_ref.rollout.val_kwargs``."""
    top_p = float(val_kwargs.top_p)
    return Sampling(
        temperature=float(val_kwargs.temperature),
        top_p=None if top_p == 1.0 else top_p,
        max_tokens=max_tokens,
        seed=seed,
    )
