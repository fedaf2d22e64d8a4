"""What a training run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agl_grpc.evaluation import Evaluation
from agl_grpc.learner.checkpoints.best import BestCheckpoint
from agl_grpc.model import RolloutStatus
from agl_grpc.model.training import StepMetrics, TrainingRun
from agl_grpc.trainer.run_folder import RunFolder

Scores = dict[str, Evaluation]


@dataclass(frozen=True)
class ModelResult:
    """What one trained model came to.

    Attributes:
        training_run: as the store knows it.
        history: metrics of all steps.
        checkpoint: folder of the last committed checkpoint; None when there is none.
        model: folder of that checkpoint's model, for ``transformers``.
        best: the checkpoint with the best validation score during training, all models' together; None when
            there was none.
        adapter: folder of that checkpoint's adapter, in peft's form; None where whole weights are trained.
    """

    training_run: TrainingRun
    history: list[StepMetrics] = field(default_factory=list)
    checkpoint: Path | None = None
    model: Path | None = None
    best: BestCheckpoint | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class FitResult:
    """Answer of `Trainer.fit`.

    Attributes:
        folder: where everything lies.
        training_run: as the store knows it; None for algorithms that run in this process.
        history: metrics of all steps.
        before: validation before training, by name (``sampled``, ``greedy``).
        after: validation after training.
        best: the checkpoint with the best validation score during training; None when there was none.
        checkpoint: folder of the last committed checkpoint; None when there is none.
        model: folder of that checkpoint's model, for ``transformers``.
        models: the same of each model that `VERL` trained, by name; above stand those of the first, which
            leads.
        captured: the engine's counters of model calls, among them ``captured`` and ``delivered``, summed over
            several engines; empty when the engine was not started here.
        restarts: how often the store was started again.
        value: what an algorithm in this process answered.
        rollouts: how many rollouts of the run, of validation too and of earlier sessions, were in each state
            at the end; empty when the store could not be asked any more.
    """

    folder: RunFolder
    training_run: TrainingRun | None = None
    history: list[StepMetrics] = field(default_factory=list)
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    best: BestCheckpoint | None = None
    checkpoint: Path | None = None
    model: Path | None = None
    models: Mapping[str, ModelResult] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    value: object = None
    rollouts: Mapping[RolloutStatus, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """How many rollouts of the run failed for good: no attempt of theirs succeeded."""
        return self.rollouts.get(RolloutStatus.FAILED, 0)

    @property
    def unfinished(self) -> int:
        """How many rollouts of the run the algorithm did not wait for."""
        return sum(count for status, count in self.rollouts.items() if not status.is_terminal)
