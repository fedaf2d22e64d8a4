"""What the learner process gives to the trainer: sources of rollouts, places for weights and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from agl_grpc.learner.batch.checks import LogprobLimits
from agl_grpc.learner.rollouts.curriculum import TaskOrder
from agl_grpc.learner.rollouts.groups import FinishedRollout, RolloutSource
from agl_grpc.learner.run_config import BestOf, Deadlines

if TYPE_CHECKING:
    from agl_grpc.learner.trainer import AglTrainer
    from agl_grpc.learner.verl.local_queue import LocalQueue


class WeightPublication(Protocol):
    """Brings the trainer's weights to the engines; stands where verl has its checkpoint-engine manager."""

    def bind(self, actors: Any) -> None:
        """Names verl's actor worker group, whose ranks send."""

    def update_weights(self, version: int) -> dict[str, float]:
        """Publishes the weights as policy version ``version``; returns when every engine serves them."""


class CheckpointStore(Protocol):
    """Keeps checkpoints; see ``checkpoint.py``."""

    def save(self, trainer: AglTrainer) -> None:
        """Saves the trainer's state as one checkpoint."""

    def commit(self, trainer: AglTrainer) -> None:
        """Commits the batches that the checkpoint saved last contains, if that is still to be done."""


class Validation(Protocol):
    """Scores the weights that the engines serve; see ``validation.py``."""

    def run(self, step: int, tasks: Iterable[Any]) -> tuple[dict[str, float], bool]:
        """Metrics of the tasks, and whether the step's checkpoint is to be kept."""


@dataclass
class Hooks:
    """What the learner process gives to the trainer."""

    source: RolloutSource
    publication: WeightPublication
    checkpoints: CheckpointStore
    run_name: str
    origin: int = 1
    # Asks for what the followed training run trains in a step: which of the step's batches, from 0; None =
    # this training run follows none.
    leaders_batch: Callable[[int, int], None] | None = None
    # Groups of the batches that an earlier trainer claimed and did not commit, by step, in their order.
    replay: dict[int, list[list[str]]] = field(default_factory=dict)
    limits: LogprobLimits = field(default_factory=LogprobLimits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    failure_limit: int = 64
    best_of: BestOf = field(default_factory=BestOf)
    # Holds the rows of batches, which verl's workers are given; None = verl's TransferQueue holds them.
    queue: LocalQueue | None = None
    # Makes the order of tasks for a dataset; None = verl's own sampler.
    order: Callable[[Any], TaskOrder] | None = None
    # Called after each step (0 = before training); answers whether to stop.
    on_metrics: Callable[[int, dict[str, float]], bool] = lambda _step, _metrics: False
    # Whether the training run was asked to stop, as far as that is known before its report.
    is_stopping: Callable[[], bool] = lambda: False
    # Called with each step's rollouts, before its metrics.
    on_rollouts: Callable[[int, list[FinishedRollout]], None] = lambda _step, _rollouts: None
    # How validation tasks are done; None = as verl does it, through the source.
    validation: Validation | None = None
    # Called with the step and the name of an error that ends training, before the last checkpoint.
    on_error: Callable[[int, str], None] = lambda _step, _name: None
    # Told each thing worth a line.
    say: Callable[[str], None] = lambda _text: None
