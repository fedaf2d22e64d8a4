"""The training run as the store knows it: taken up, reported to, ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from agl_grpc.client import NotFound
from agl_grpc.client.filters import rollout_filter
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model.enums import BatchStatus, TrainingRunStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.training import StepMetrics
from agl_grpc.model.training import TrainingRun as TrainingRunRecord

# Label by which a trainer finds its own rollouts; the value is `{training run}/{trainer epoch}`.
TRAINING_LABEL = "training"


@dataclass(frozen=True)
class TrainingIdentity:
    """Which training run this is, and under which epoch of the trainer."""

    run_id: str
    training_run_id: str
    trainer_epoch: int

    @property
    def labels(self) -> dict[str, str]:
        """The labels of this epoch's rollouts."""
        return {TRAINING_LABEL: f"{self.training_run_id}/{self.trainer_epoch}"}


class TrainingRun:
    """One training run held by this process; older trainers of it are fenced."""

    def __init__(self, link: StoreLink, record: TrainingRunRecord) -> None:
        self._link = link
        self._client = link.client
        self.identity = TrainingIdentity(record.run_id, record.training_run_id, record.trainer_epoch)
        self.checkpoint_id = record.checkpoint_id or ""
        self.stop_requested = False

    @classmethod
    def acquire(cls, link: StoreLink, training_run_id: str) -> TrainingRun:
        """Takes the training run up, making it first when it is new; an empty id makes a new one."""
        record = link.run(cls._acquire(link, training_run_id))
        if record.run_id != link.client.run_id:
            raise LearnerError(
                f"training run {record.training_run_id} belongs to run {record.run_id!r}, not to "
                f"{link.client.run_id!r}"
            )
        return cls(link, record)

    @staticmethod
    async def _acquire(link: StoreLink, training_run_id: str) -> TrainingRunRecord:
        client = link.client
        trainer = f"{socket.gethostname()}:{os.getpid()}"
        if training_run_id:
            try:
                return await client.acquire_training_run(training_run_id, trainer)
            except NotFound:
                pass  # A new name is a new training run.
        wanted = TrainingRunRecord(training_run_id=training_run_id, run_id=client.run_id, algorithm="verl")
        made = await client.create_training_run(wanted)
        return await client.acquire_training_run(made.training_run_id, trainer)

    def discard_leftovers(self) -> int:
        """Ends what earlier trainers of this run left: uncommitted batches and unfinished rollouts.

        Answers the number of rollouts cancelled.
        """
        return self._link.run(self._discard_leftovers())

    async def _discard_leftovers(self) -> int:
        mine = self.identity
        batches = await self._client.query_batches(mine.training_run_id, status_in=[BatchStatus.CLAIMED])
        if batches:
            ids = [batch.batch_id for batch in batches]
            await self._client.release_batches(mine.training_run_id, mine.trainer_epoch, ids)
        cancelled = 0
        for epoch in range(1, mine.trainer_epoch):
            older = TrainingIdentity(mine.run_id, mine.training_run_id, epoch)
            ids = await self._client.cancel_rollouts(
                filter=rollout_filter(run_id=mine.run_id, labels=older.labels),
                reason="a newer trainer took the training run up",
            )
            cancelled += len(ids)
        return cancelled

    def commit(self, checkpoint_id: str, batch_ids: list[str], step: int) -> None:
        """Marks batches as trained; the checkpoint that contains them is saved."""
        mine = self.identity
        work = self._client.commit_batches(
            mine.training_run_id, mine.trainer_epoch, checkpoint_id, batch_ids, step=step
        )
        self._link.run(work)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports a step's metrics; then ``stop_requested`` says whether somebody asked to stop."""
        mine = self.identity
        numbers = StepMetrics(step=step, metrics=dict(metrics))
        record = self._link.run(
            self._client.report_metrics(mine.training_run_id, mine.trainer_epoch, [numbers])
        )
        self.stop_requested = record.status is TrainingRunStatus.STOPPING

    def finish(self, status: TrainingRunStatus, error: BaseException | None = None) -> None:
        """Ends the training run; ``error`` says why it failed."""
        mine = self.identity
        failure = None if error is None else Failure.from_exception(error)
        work = self._client.finish_training_run(mine.training_run_id, mine.trainer_epoch, status, failure)
        self._link.run(work)
