"""The training run as the store knows it: taken up, reported to, ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agl_grpc.client import NotFound
from agl_grpc.client.filters import rollout_filter
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model.enums import BatchStatus, RolloutMode, RolloutStatus, TrainingRunStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import Rollout
from agl_grpc.model.training import Batch, StepMetrics
from agl_grpc.model.training import TrainingRun as TrainingRunRecord
from agl_grpc.sample import SampleRules

# Label by which a trainer finds its own rollouts; the value is `{training run}/{origin}`.
TRAINING_LABEL = "training"
# Label that says for which step's batch a rollout was asked for.
STEP_LABEL = "training_step"

_CANCEL_AT_ONCE = 500
# Beyond every step: the watch of a training run's state alone.
_NO_STEP = 2**62
_UNFINISHED = (
    RolloutStatus.QUEUING,
    RolloutStatus.PREPARING,
    RolloutStatus.RUNNING,
    RolloutStatus.REQUEUING,
)


@dataclass(frozen=True)
class TrainingIdentity:
    """Which training run this is, and under which epoch of the trainer.

    ``origin`` is the epoch that began from the first prompt: a resumed trainer shares it, and the rollouts,
    with those before it.
    """

    run_id: str
    training_run_id: str
    trainer_epoch: int
    origin: int

    @property
    def labels(self) -> dict[str, str]:
        """The labels of this run's rollouts, from its first prompt on."""
        return {TRAINING_LABEL: f"{self.training_run_id}/{self.origin}"}

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier trainer may have left rollouts of this run."""
        return self.origin < self.trainer_epoch


class TrainingRun:
    """One training run held by this process; older trainers of it are fenced."""

    def __init__(self, link: StoreLink, record: TrainingRunRecord) -> None:
        self._link = link
        self._client = link.client
        epoch = record.trainer_epoch
        self.identity = TrainingIdentity(record.run_id, record.training_run_id, epoch, origin=epoch)
        self.checkpoint_id = record.checkpoint_id or ""
        self.stop_requested = False

    @classmethod
    def acquire(cls, link: StoreLink, training_run_id: str, algorithm: str = "verl") -> TrainingRun:
        """Takes the training run up, making it first when it is new; an empty id makes a new one."""
        record = link.run(cls._acquire(link, training_run_id, algorithm))
        if record.run_id != link.client.run_id:
            raise LearnerError(
                f"training run {record.training_run_id} belongs to run {record.run_id!r}, not to "
                f"{link.client.run_id!r}"
            )
        return cls(link, record)

    @staticmethod
    async def _acquire(link: StoreLink, training_run_id: str, algorithm: str) -> TrainingRunRecord:
        client = link.client
        trainer = f"{socket.gethostname()}:{os.getpid()}"
        if training_run_id:
            try:
                return await client.acquire_training_run(training_run_id, trainer)
            except NotFound:
                pass  # A new name is a new training run.
        wanted = TrainingRunRecord(training_run_id=training_run_id, run_id=client.run_id, algorithm=algorithm)
        made = await client.create_training_run(wanted)
        return await client.acquire_training_run(made.training_run_id, trainer)

    def go_on_from(self, origin: int) -> None:
        """Makes this trainer the next of those that began with epoch ``origin``."""
        self.identity = replace(self.identity, origin=origin)

    def discard_leftovers(self, step: int, *, alone: bool = True) -> int:
        """Cancels unfinished rollouts of earlier trainers that cannot be taken over at ``step``.

        Those of the step that is next are: the weights that sample them are the ones in force. Rollouts of
        later steps would be sampled too early; so would all, where this trainer is not ``alone``: other
        models, which they use too, may not serve their weights of ``step`` yet. Answers the number of
        rollouts cancelled.
        """
        return self._link.run(self._discard_leftovers(step, alone))

    async def _discard_leftovers(self, step: int, alone: bool) -> int:
        mine = self.identity
        useless: list[str] = []
        for origin in range(1, mine.trainer_epoch):
            for rollout in await self._unfinished(replace(mine, origin=origin)):
                wanted_now = alone and origin == mine.origin and rollout.mode is RolloutMode.TRAIN
                if not wanted_now or int(rollout.labels.get(STEP_LABEL, 0)) > step + 1:
                    useless.append(rollout.rollout_id)
        return await self._cancel(useless, "a newer trainer took the training run up")

    def cancel_unfinished(self) -> int:
        """Cancels what this run asked for ahead and will not train, its last step being made.

        Answers the number of rollouts cancelled.
        """
        return self._link.run(self._cancel_unfinished())

    async def _cancel_unfinished(self) -> int:
        useless = [rollout.rollout_id for rollout in await self._unfinished(self.identity)]
        return await self._cancel(useless, "the training run has ended")

    async def _unfinished(self, identity: TrainingIdentity) -> Sequence[Rollout]:
        chosen = rollout_filter(run_id=identity.run_id, labels=identity.labels, status_in=_UNFINISHED)
        return await self._client.query_rollouts(filter=chosen)

    async def _cancel(self, rollout_ids: Sequence[str], reason: str) -> int:
        cancelled = 0
        for at in range(0, len(rollout_ids), _CANCEL_AT_ONCE):
            some = rollout_ids[at : at + _CANCEL_AT_ONCE]
            cancelled += len(await self._client.cancel_rollouts(some, reason=reason))
        return cancelled

    def released(self, step: int) -> dict[int, list[Batch]]:
        """Batches after ``step`` that an earlier trainer had claimed and not committed, by their step.

        Of several trainers that came to a step, the newest one's count.
        """
        mine = self.identity
        work = self._client.query_batches(mine.training_run_id, status_in=[BatchStatus.RELEASED])
        found: dict[int, list[Batch]] = {}
        for batch in self._link.run(work):
            if batch.step <= step or batch.trainer_epoch < mine.origin:
                continue
            if batch.step in found and found[batch.step][0].trainer_epoch < batch.trainer_epoch:
                found[batch.step] = []
            found.setdefault(batch.step, []).append(batch)
        return found

    def commit(self, checkpoint_id: str, batch_ids: list[str], step: int) -> None:
        """Marks batches as trained; the checkpoint that contains them is saved."""
        mine = self.identity
        work = self._client.commit_batches(
            mine.training_run_id, mine.trainer_epoch, checkpoint_id, batch_ids, step=step
        )
        self._link.run(work)
        self.checkpoint_id = checkpoint_id

    def report(self, step: int, metrics: Mapping[str, float], log: Sequence[str] = ()) -> None:
        """Reports a step's metrics and lines; then ``stop_requested`` says whether somebody asked to stop."""
        mine = self.identity
        numbers = StepMetrics(step=step, metrics=dict(metrics))
        record = self._link.run(
            self._client.report_metrics(mine.training_run_id, mine.trainer_epoch, [numbers], log=log)
        )
        self.stop_requested = record.status is TrainingRunStatus.STOPPING

    async def asked_to_stop(self) -> None:
        """Returns once somebody has asked this training run to stop, as `stop_requested` then says, or at its
        end.
        """
        mine = self.identity.training_run_id
        async for record, _ in self._client.watch_training_run(mine, from_step=_NO_STEP):
            if record is not None and record.status is TrainingRunStatus.STOPPING:
                self.stop_requested = True
                return

    def log(self, line: str) -> None:
        """Adds a line to the training run's log, for whoever follows it."""
        mine = self.identity
        self._link.run(self._client.report_metrics(mine.training_run_id, mine.trainer_epoch, [], log=[line]))

    def finish(
        self, status: TrainingRunStatus, error: BaseException | None = None, result: Any = None
    ) -> None:
        """Ends the training run; ``error`` says why it failed, ``result`` what came of it: a JSON value."""
        mine = self.identity
        failure = None if error is None else Failure.from_exception(error)
        work = self._client.finish_training_run(
            mine.training_run_id, mine.trainer_epoch, status, failure, result
        )
        self._link.run(work)


def frozen_rewards(released: Mapping[int, Sequence[Batch]], rules: SampleRules) -> dict[str, list[Reward]]:
    """By rollout, the rewards that batches froze, those of steps and calls too: they count when the batches
    are made again, whatever was revised since.

    Args:
        released: batches by step.
        rules: by which rewards count; one that stands alone in a batch is the one that they name.
    """
    found: dict[str, list[Reward]] = {}
    for entry in (entry for batches in released.values() for batch in batches for entry in batch.entries):
        if entry.rewards:
            found[entry.rollout_id] = entry.rewards
        elif entry.reward is not None:
            (name,) = rules.counted_rewards
            alone = Reward(
                rollout_id=entry.rollout_id,
                attempt_id=entry.attempt_id,
                name=name,
                value=entry.reward,
                revision=entry.reward_revision,
            )
            found[entry.rollout_id] = [alone]
    return found


def batch_groups(batch: Batch) -> list[str]:
    """The groups of a batch, in the order in which they are trained."""
    return list(dict.fromkeys(entry.group_id or "" for entry in batch.entries))
