"""Training runs, batches and metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound
from agl_grpc.client.watch import Watched, resumed, watch
from agl_grpc.model import raw
from agl_grpc.model.enums import BatchStatus, TrainingRunStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.span import id_bytes
from agl_grpc.model.training import Batch, LogLine, StepMetrics, TrainingRun
from agl_grpc.model.value import to_payload
from agl_grpc.v1 import batch_pb2, training_pb2
from agl_grpc.v1 import trainer_service_pb2 as pb

_NO_STEP = 2**62  # above any: a watcher of the log wants none

_TRAINER = "agl_grpc.v1.TrainerService"


class RolloutsUnsealed(RuntimeError):
    """A batch was not claimed because some of its rollouts are not sealed; ``rollout_ids`` names them."""

    def __init__(self, rollout_ids: Sequence[str]) -> None:
        super().__init__(f"{len(rollout_ids)} rollouts are not sealed yet, first {rollout_ids[0]}")
        self.rollout_ids = list(rollout_ids)


class TrainingCalls(Connection):
    """The client's methods for training runs and batches."""

    async def create_training_run(self, training_run: TrainingRun) -> TrainingRun:
        """Ask for a training run; a trainer takes it up."""
        request = pb.CreateTrainingRunRequest(training_run=training_run.to_proto())
        response = await self.call(self.bound.trainer.CreateTrainingRun, request)
        return TrainingRun.from_proto(response.training_run)

    async def get_training_run_by_id(self, training_run_id: str) -> TrainingRun | None:
        """One training run; ``None`` when unknown."""
        try:
            request = pb.GetTrainingRunRequest(training_run_id=training_run_id)
            response = await self.call(self.bound.trainer.GetTrainingRun, request)
        except NotFound:
            return None
        return TrainingRun.from_proto(response.training_run)

    async def query_training_runs(
        self, *, status_in: Sequence[TrainingRunStatus | str] = (), run_id: str | None = None
    ) -> list[TrainingRun]:
        """Training runs of a run, or of all (``*``)."""
        request = pb.ListTrainingRunsRequest(
            run_id=self.run_or_default(run_id),
            status_in=[TrainingRunStatus.parse(status).number for status in status_in],
        )
        return await self.read_all(
            self.bound.trainer.ListTrainingRuns,
            request,
            lambda page: map(TrainingRun.from_proto, page.training_runs),
        )

    async def acquire_training_run(
        self, training_run_id: str, trainer_id: str, *, only_pending: bool = False
    ) -> TrainingRun:
        """Take a training run up under a new trainer epoch, which fences all older ones.

        With ``only_pending`` one that is not pending is left alone: `IllegalTransition`.
        """
        request = pb.AcquireTrainingRunRequest(
            training_run_id=training_run_id, trainer_id=trainer_id, only_pending=only_pending
        )
        response = await self.call(self.bound.trainer.AcquireTrainingRun, request)
        return TrainingRun.from_proto(response.training_run)

    async def finish_training_run(
        self,
        training_run_id: str,
        trainer_epoch: int,
        status: TrainingRunStatus | str,
        failure: Failure | None = None,
        result: Any = None,
    ) -> TrainingRun:
        """End a training run as ``succeeded``, ``failed`` or ``stopped``, with what came of it."""
        request = pb.FinishTrainingRunRequest(
            training_run_id=training_run_id,
            trainer_epoch=trainer_epoch,
            status=TrainingRunStatus.parse(status).number,
            failure=failure.to_proto() if failure else None,
            result=None if result is None else to_payload(result, "result"),
        )
        response = await self.call(self.bound.trainer.FinishTrainingRun, request)
        return TrainingRun.from_proto(response.training_run)

    async def stop_training_run(self, training_run_id: str, reason: str = "") -> TrainingRun:
        """Ask a training run to stop after its step."""
        request = pb.StopTrainingRunRequest(training_run_id=training_run_id, reason=reason)
        response = await self.call(self.bound.trainer.StopTrainingRun, request)
        return TrainingRun.from_proto(response.training_run)

    async def report_metrics(
        self,
        training_run_id: str,
        trainer_epoch: int,
        steps: Sequence[StepMetrics],
        *,
        log: Sequence[str] = (),
    ) -> TrainingRun:
        """Report metrics and lines for people; the answer, the training run, shows a request to stop."""
        request = pb.ReportMetricsRequest(
            training_run_id=training_run_id,
            trainer_epoch=trainer_epoch,
            steps=[step.to_proto() for step in steps],
            log=[training_pb2.LogLine(text=text) for text in log],
        )
        response = await self.call(self.bound.trainer.ReportMetrics, request)
        return TrainingRun.from_proto(response.training_run)

    async def watch_training_run(
        self, training_run_id: str, *, from_step: int = 0
    ) -> AsyncGenerator[tuple[TrainingRun | None, list[StepMetrics]], None]:
        """State (``None`` = unchanged) and metrics as they come, from a step on, to the run's end.

        A trainer that goes on from a checkpoint reports steps again, under its own epoch.
        """
        request = pb.WatchTrainingRunRequest(training_run_id=training_run_id, from_step=from_step)
        last = (0, from_step - 1)

        def advance(request: Any, message: Any) -> None:
            # The last one, not the highest: a newer trainer may have gone back.
            request.from_step = message.steps[-1].step if message.steps else request.from_step

        async for message in resumed(self, lambda bound: bound.trainer.WatchTrainingRun, request, advance):
            # A resumed stream repeats the last step that was seen.
            steps = [
                StepMetrics.from_proto(step)
                for step in message.steps
                if (step.trainer_epoch, step.step) > last
            ]
            last = max([last, *((step.trainer_epoch, step.step) for step in steps)])
            run = TrainingRun.from_proto(message.training_run) if message.HasField("training_run") else None
            if run is not None or steps:
                yield run, steps
            if run is not None and run.status.is_terminal:
                return

    async def watch_training_log(self, training_run_id: str, *, after: int = 0) -> AsyncIterator[LogLine]:
        """Lines for people as they come, those above a number, to the run's end."""
        request = pb.WatchTrainingRunRequest(
            training_run_id=training_run_id, from_step=_NO_STEP, include_log=True, after_log=after
        )

        def advance(request: Any, message: Any) -> None:
            request.after_log = message.log[-1].number if message.log else request.after_log

        async for message in resumed(self, lambda bound: bound.trainer.WatchTrainingRun, request, advance):
            for line in message.log:
                yield LogLine.from_proto(line)

    def watch_training_runs(
        self, *, run_id: str = "*", cursor: int = 0, include_existing: bool = False
    ) -> AsyncIterator[Watched[TrainingRun]]:
        """Training runs as they change, resumed by cursor after every disconnect.

        With ``include_existing`` those that have not ended come first.
        """
        request = pb.WatchTrainingRunsRequest(run_id=run_id, cursor=cursor, include_existing=include_existing)
        return watch(
            self,
            lambda bound: bound.trainer.WatchTrainingRuns,
            request,
            lambda message: map(TrainingRun.from_proto, message.training_runs),
        )

    async def claim_batch(
        self,
        training_run_id: str,
        trainer_epoch: int,
        step: int,
        rollout_ids: Sequence[str],
        *,
        rules: batch_pb2.SampleRules | None = None,
    ) -> Batch:
        """Freeze sealed rollouts, in training order, into a batch; `RolloutsUnsealed` when some are not.

        ``rules`` say how samples are made of them (default: the store's own defaults) and belong to the
        batch's content hash: a replay follows them.
        """
        request = pb.ClaimBatchRequest(
            training_run_id=training_run_id,
            trainer_epoch=trainer_epoch,
            step=step,
            rollout_ids=rollout_ids,
            rules=rules,
        )
        response = await self.call(self.bound.trainer.ClaimBatch, request)
        if response.unsealed_rollout_ids:
            raise RolloutsUnsealed(response.unsealed_rollout_ids)
        return Batch.from_proto(response.batch)

    async def get_batch(self, batch_id: str = "", *, content_hash: str = "") -> Batch | None:
        """One batch, by its id or as the newest of a content hash; ``None`` when unknown."""
        request = pb.GetBatchRequest(batch_id=batch_id, content_hash=content_hash)
        try:
            response = await self.call(self.bound.trainer.GetBatch, request)
        except NotFound:
            return None
        return Batch.from_proto(response.batch)

    async def query_batches(
        self, training_run_id: str, *, status_in: Sequence[BatchStatus | str] = (), from_step: int = 0
    ) -> list[Batch]:
        """Batches of a training run, in order of their claim; only of ``from_step`` and of later steps."""
        request = pb.ListBatchesRequest(
            training_run_id=training_run_id,
            from_step=from_step,
            status_in=[BatchStatus.parse(status).number for status in status_in],
        )
        return await self.read_all(
            self.bound.trainer.ListBatches, request, lambda page: map(Batch.from_proto, page.batches)
        )

    def stream_batch(self, batch_id: str) -> AsyncIterator[Any]:
        """A claimed or committed batch's samples as ``RawStreamBatchResponse``, resumed after disconnects.

        `agl_grpc.sample.read_columns` makes arrays of an answer's ``samples``; its ``account`` says where the
        tokens of its attempts went.
        """
        return self._samples("StreamBatch", pb.StreamBatchRequest(batch_id=batch_id))

    def replay_batch(self, content_hash: str) -> AsyncIterator[Any]:
        """A batch's samples again by content hash, bit for bit, in the form of `stream_batch`."""
        return self._samples("ReplayBatch", pb.ReplayBatchRequest(content_hash=content_hash))

    async def _samples(
        self, name: str, request: pb.StreamBatchRequest | pb.ReplayBatchRequest
    ) -> AsyncIterator[Any]:
        def method(bound: Any) -> Any:
            # Columns stay bytes, of which arrays are made without a copy.
            return bound.channel.unary_stream(
                f"/{_TRAINER}/{name}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=raw.RawStreamBatchResponse.FromString,
            )

        def advance(request: Any, message: Any) -> None:
            request.first_entry = message.next_entry

        async for message in resumed(self, method, request, advance):
            yield message

    async def explain_tokens(
        self, rollout_id: str, span_id: str, *, attempt_id: str = "latest", choice: int = 0
    ) -> pb.ExplainTokensResponse:
        """What became of the tokens of one choice of a model call (``span_id`` in hex), and why."""
        span = id_bytes("span_id", span_id, 8)
        request = pb.ExplainTokensRequest(
            rollout_id=rollout_id, attempt_id=attempt_id, span_id=span, choice=choice
        )
        return await self.call(self.bound.trainer.ExplainTokens, request)

    async def commit_batches(
        self,
        training_run_id: str,
        trainer_epoch: int,
        checkpoint_id: str,
        batch_ids: Sequence[str],
        *,
        step: int,
        checkpoint_digest: str = "",
    ) -> TrainingRun:
        """Mark batches as trained, after the checkpoint that contains them was saved."""
        request = pb.CommitBatchesRequest(
            training_run_id=training_run_id,
            trainer_epoch=trainer_epoch,
            checkpoint_id=checkpoint_id,
            batch_ids=batch_ids,
            step=step,
            checkpoint_digest=checkpoint_digest,
        )
        response = await self.call(self.bound.trainer.CommitBatches, request)
        return TrainingRun.from_proto(response.training_run)

    async def release_batches(
        self, training_run_id: str, trainer_epoch: int, batch_ids: Sequence[str]
    ) -> None:
        """Give claimed batches back."""
        request = pb.ReleaseBatchesRequest(
            training_run_id=training_run_id, trainer_epoch=trainer_epoch, batch_ids=batch_ids
        )
        await self.call(self.bound.trainer.ReleaseBatches, request)
