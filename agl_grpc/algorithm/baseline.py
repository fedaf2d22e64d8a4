"""`Baseline`: has tasks done without learning anything, to try agent, workers and rewards out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agl_grpc.algorithm.base import Algorithm, Dataset
from agl_grpc.algorithm.concurrency import together
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.client.rollout_batch import primary_rewards, run_rollouts
from agl_grpc.model import EnqueueRolloutRequest, Rollout, RolloutMode, Span

SpanVerbosity = Literal["none", "keys", "key_values"]


class FastAlgorithm(Algorithm):
    """Base of algorithms that need no GPU and little time: `Trainer.dev` runs them."""


@dataclass(frozen=True)
class BaselineResult:
    """What came of the tasks: rollouts as they ended, rewards by rollout id, what the adapter made."""

    rollouts: list[Rollout] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    adapted: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean reward; a rollout without one counts as 0."""
        return sum(self.rewards.values()) / len(self.rollouts) if self.rollouts else 0.0


class Baseline(FastAlgorithm):
    """Has every task of the datasets done, and says how each went.

    Args:
        n_epochs: how often the training dataset is done.
        max_queue_length: rollouts under way at once.
        span_verbosity: what is said of each span: ``none``, ``keys`` (its name and its attributes' names) or
            ``key_values``.

    The training dataset is done in mode ``train``, the validation dataset once in mode ``val``. `run` answers
    a `BaselineResult`; an adapter with ``adapt(spans)`` is applied to each rollout's spans.
    """

    def __init__(
        self, *, n_epochs: int = 1, max_queue_length: int = 4, span_verbosity: SpanVerbosity = "keys"
    ) -> None:
        super().__init__()
        if n_epochs < 1 or max_queue_length < 1:
            raise ValueError("n_epochs and max_queue_length must be 1 or more")
        if span_verbosity not in ("none", "keys", "key_values"):
            raise ValueError(f"span_verbosity {span_verbosity!r} is none of none, keys, key_values")
        self._n_epochs = n_epochs
        self._at_once = max_queue_length
        self._verbosity = span_verbosity

    async def run(
        self, train_dataset: Dataset | None = None, val_dataset: Dataset | None = None
    ) -> BaselineResult:
        """Has the tasks done; answers how they ended."""
        tasks = [(task, RolloutMode.TRAIN) for _ in range(self._n_epochs) for task in train_dataset or ()]
        tasks += [(task, RolloutMode.VAL) for task in val_dataset or ()]
        if not tasks:
            raise AlgorithmError("Baseline has nothing to do: give train_dataset or val_dataset")
        result = BaselineResult()
        # A slot is free again when its rollout has ended: a stream for each, none asks twice.
        slots = asyncio.Semaphore(self._at_once)

        async def one(task: Any, mode: RolloutMode) -> None:
            async with slots:
                request = EnqueueRolloutRequest(input=task, mode=mode)
                async for rollout in run_rollouts(self.get_store(), [request]):
                    await self._ended(rollout, result, len(tasks))

        await together(one(task, mode) for task, mode in tasks)
        self.get_reporter().say(f"{len(tasks)} rollouts, mean reward {result.mean:.3f}")
        return result

    async def _ended(self, rollout: Rollout, result: BaselineResult, total: int) -> None:
        store, reporter = self.get_store(), self.get_reporter()
        result.rollouts.append(rollout)
        result.rewards.update(await primary_rewards(store, [rollout]))
        reward = result.rewards.get(rollout.rollout_id)
        why = f": {rollout.failure.message}" if rollout.failure else ""
        reporter.say(f"rollout {rollout.rollout_id} {rollout.status.value}, reward {reward}{why}")
        spans = await store.query_spans(rollout.rollout_id, "latest")
        for line in _described(spans.items, self._verbosity):
            reporter.say(line)
        adapter = self.get_adapter()
        if adapter is not None:
            result.adapted[rollout.rollout_id] = adapter.adapt(spans.items)
            reporter.say(f"  adapted: {result.adapted[rollout.rollout_id]!r}")
        if reward is not None:
            reporter.step(len(result.rollouts), {"reward/mean": reward}, total)


def _described(spans: Sequence[Span], verbosity: SpanVerbosity) -> Iterator[str]:
    for span in spans if verbosity != "none" else ():
        shown = span.attributes if verbosity == "key_values" else [*span.attributes]
        yield f"  {span.sequence_id} {span.name} {shown}"
