"""Validation during training: the same evaluation as `agl-grpc eval`, by the run's own workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.evaluation import Evaluation, EvaluationError, Pass, Sampling, evaluate, publish_sampling
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model import LLM


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

    def run(self, step: int, tasks: Sequence[Any]) -> tuple[dict[str, float], bool]:
        """Scores the weights that the engines serve after ``step``.

        Returns:
            metrics under verl's names, and whether the step's checkpoint is to be kept.

        Raises:
            LearnerError: the pass did not come to an end, or no rollout got as far as an answer.
        """
        try:
            found = self._link.run(self._evaluate(step, tasks))
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
