"""The training run as the store knows it: taken up, reported to, ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.store_link import StoreLink, new_request_id
from agl_grpc.learner.store_source import TrainingIdentity
from agl_grpc.v1 import attempt_pb2, batch_pb2, rollout_pb2, training_pb2
from agl_grpc.v1 import store_service_pb2 as store_pb2
from agl_grpc.v1 import trainer_service_pb2 as trainer_pb2


class TrainingRun:
    """One training run held by this process; older trainers of it are fenced."""

    def __init__(self, link: StoreLink, record: training_pb2.TrainingRun) -> None:
        self._link = link
        self.identity = TrainingIdentity(record.run_id, record.training_run_id, record.trainer_epoch)
        self.checkpoint_id = record.checkpoint_id
        self.stop_requested = False

    @classmethod
    def acquire(cls, link: StoreLink, *, run_id: str, training_run_id: str) -> TrainingRun:
        """Takes the training run up, making it first when it is new."""
        identifier = training_run_id or cls._create(link, run_id, "")
        trainer_id = f"{socket.gethostname()}:{os.getpid()}"
        request = trainer_pb2.AcquireTrainingRunRequest(
            request_id=new_request_id(), training_run_id=identifier, trainer_id=trainer_id
        )
        try:
            answer = link.ask(link.trainer.AcquireTrainingRun, request, what="take up the training run")
        except LearnerError as error:
            if not training_run_id or "NOT_FOUND" not in str(error):
                raise
            cls._create(link, run_id, training_run_id)
            answer = link.ask(link.trainer.AcquireTrainingRun, request, what="take up the training run")
        if answer.training_run.run_id != run_id:
            raise LearnerError(
                f"training run {identifier} belongs to run {answer.training_run.run_id!r}, not to {run_id!r}"
            )
        return cls(link, answer.training_run)

    @staticmethod
    def _create(link: StoreLink, run_id: str, training_run_id: str) -> str:
        request = trainer_pb2.CreateTrainingRunRequest(
            request_id=new_request_id(),
            training_run=training_pb2.TrainingRun(
                training_run_id=training_run_id, run_id=run_id, algorithm="verl"
            ),
        )
        answer = link.ask(link.trainer.CreateTrainingRun, request, what="make the training run")
        return answer.training_run.training_run_id

    def discard_leftovers(self) -> int:
        """Ends what an earlier trainer of this run left: releases its uncommitted batches, cancels its
        rollouts.

        Answers the number of rollouts cancelled.
        """
        batches = self._claimed_batches()
        if batches:
            release = trainer_pb2.ReleaseBatchesRequest(
                request_id=new_request_id(),
                training_run_id=self.identity.training_run_id,
                trainer_epoch=self.identity.trainer_epoch,
                batch_ids=batches,
            )
            self._link.ask(self._link.trainer.ReleaseBatches, release, what="release batches")
        cancelled = 0
        for epoch in range(1, self.identity.trainer_epoch):
            older = TrainingIdentity(self.identity.run_id, self.identity.training_run_id, epoch)
            cancel = store_pb2.CancelRolloutsRequest(
                request_id=new_request_id(),
                filter=rollout_pb2.RolloutFilter(run_id=self.identity.run_id, labels=[older.label]),
                reason="a newer trainer took the training run up",
            )
            answer = self._link.ask(self._link.store.CancelRollouts, cancel, what="cancel older rollouts")
            cancelled += len(answer.rollout_ids)
        return cancelled

    def _claimed_batches(self) -> list[str]:
        ids: list[str] = []
        token = ""
        while True:
            request = trainer_pb2.ListBatchesRequest(
                training_run_id=self.identity.training_run_id,
                status_in=[batch_pb2.BATCH_STATUS_CLAIMED],
                page_token=token,
            )
            answer = self._link.ask(self._link.trainer.ListBatches, request, what="list batches")
            ids.extend(batch.batch_id for batch in answer.batches)
            token = answer.next_page_token
            if not token:
                return ids

    def commit(self, checkpoint_id: str, batch_ids: list[str], step: int) -> None:
        """Marks batches as trained; the checkpoint that contains them is saved."""
        request = trainer_pb2.CommitBatchesRequest(
            request_id=new_request_id(),
            training_run_id=self.identity.training_run_id,
            trainer_epoch=self.identity.trainer_epoch,
            checkpoint_id=checkpoint_id,
            batch_ids=batch_ids,
            step=step,
        )
        self._link.ask(self._link.trainer.CommitBatches, request, what="commit batches")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports a step's metrics; afterwards ``stop_requested`` says whether somebody asked to stop."""
        numbers = [training_pb2.Metric(name=name, value=value) for name, value in sorted(metrics.items())]
        request = trainer_pb2.ReportMetricsRequest(
            request_id=new_request_id(),
            training_run_id=self.identity.training_run_id,
            trainer_epoch=self.identity.trainer_epoch,
            steps=[training_pb2.StepMetrics(step=step, metrics=numbers)],
        )
        answer = self._link.ask(self._link.trainer.ReportMetrics, request, what="report metrics")
        self.stop_requested = answer.training_run.status == training_pb2.TRAINING_RUN_STATUS_STOPPING

    def finish(self, status: training_pb2.TrainingRunStatus.ValueType, message: str = "") -> None:
        """Ends the training run; ``message`` says why it failed."""
        request = trainer_pb2.FinishTrainingRunRequest(
            request_id=new_request_id(),
            training_run_id=self.identity.training_run_id,
            trainer_epoch=self.identity.trainer_epoch,
            status=status,
        )
        if message:
            request.failure.CopyFrom(attempt_pb2.Failure(message=message[:4000], type="LearnerError"))
        self._link.ask(self._link.trainer.FinishTrainingRun, request, what="end the training run")
