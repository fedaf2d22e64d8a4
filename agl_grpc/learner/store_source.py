"""Rollouts from the store: enqueued as groups, awaited through the store's stream, read once sealed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import numpy as np
import orjson
from google.protobuf.duration_pb2 import Duration

from agl_grpc.learner.errors import FidelityError, LearnerError
from agl_grpc.learner.rollouts import (
    BatchEntry,
    ClaimedBatch,
    Deliver,
    FinishedGroup,
    FinishedRollout,
    GroupRequest,
    Row,
)
from agl_grpc.learner.store_link import StoreLink, new_request_id
from agl_grpc.sample import AttemptRecord, AttemptSamples, Sample, SampleRules, build_attempt
from agl_grpc.v1 import attempt_pb2, common_pb2, reward_pb2, rollout_pb2, span_pb2
from agl_grpc.v1 import store_service_pb2 as store_pb2
from agl_grpc.v1 import trainer_service_pb2 as trainer_pb2

# Label by which a trainer finds its own rollouts; the value is `{training run}/{trainer epoch}`.
TRAINING_LABEL = "training"
_RETRYABLE = {
    "failed": attempt_pb2.ATTEMPT_STATUS_FAILED,
    "timeout": attempt_pb2.ATTEMPT_STATUS_TIMEOUT,
    "unresponsive": attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE,
}


@dataclass(frozen=True)
class RolloutRules:
    """Rules of a rollout's life, in seconds; None = no limit. Lost leases are redelivered without using
    attempts.
    """

    timeout: float | None = None
    unresponsive: float | None = None
    max_attempts: int = 1
    retry: tuple[str, ...] = ()
    max_redeliveries: int = 3

    def message(self) -> rollout_pb2.RolloutConfig:
        """As the contract writes it."""
        config = rollout_pb2.RolloutConfig(
            max_attempts=self.max_attempts,
            max_redeliveries=self.max_redeliveries,
            retry_condition=[_RETRYABLE[name] for name in self.retry],
        )
        for name, seconds in (("timeout", self.timeout), ("unresponsive", self.unresponsive)):
            if seconds is not None:
                getattr(config, name).CopyFrom(Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)))
        return config


@dataclass
class _OpenGroup:
    request: GroupRequest
    sealed: dict[str, rollout_pb2.AttemptedRollout] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingIdentity:
    """Which training run this is, and under which epoch of the trainer."""

    run_id: str
    training_run_id: str
    trainer_epoch: int

    @property
    def label(self) -> common_pb2.Label:
        """The label of this epoch's rollouts."""
        return common_pb2.Label(key=TRAINING_LABEL, value=f"{self.training_run_id}/{self.trainer_epoch}")


class StoreSource:
    """``RolloutSource`` over the contract.

    Args:
        link: the line to the store.
        identity: training run and epoch; every rollout carries it as a label.
        rules: rules of a rollout's life.
        samples: what is trained of an attempt.
        version_offset: published policy version minus optimiser step; rows carry steps.
    """

    def __init__(
        self,
        link: StoreLink,
        identity: TrainingIdentity,
        *,
        rules: RolloutRules,
        samples: SampleRules,
        version_offset: int = 0,
    ) -> None:
        self._link = link
        self._identity = identity
        self._deliver: Deliver = _undeliverable
        self._rules = rules
        self._samples = samples
        self._offset = version_offset
        self._open: dict[str, _OpenGroup] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        self._watching = asyncio.Event()

    def start(self, deliver: Deliver) -> None:
        """Opens the watch; ``deliver`` gets every finished group, and the error that ends the watch."""
        self._deliver = deliver
        self._link.start(self._guarded_watch())

    def submit(self, groups: list[GroupRequest]) -> None:
        self._link.run(self._submit(groups))

    async def _submit(self, groups: list[GroupRequest]) -> None:
        await self._watching.wait()
        for group in groups:
            self._open[group.uid] = _OpenGroup(group)
        request = store_pb2.EnqueueRolloutsRequest(
            request_id=new_request_id(),
            run_id=self._identity.run_id,
            rollouts=[self._spec(group, number) for group in groups for number in range(group.size)],
        )
        await self._link.call(self._link.store.EnqueueRollouts, request, what="enqueue rollouts")

    def _spec(self, group: GroupRequest, number: int) -> rollout_pb2.RolloutSpec:
        return rollout_pb2.RolloutSpec(
            input=common_pb2.Payload(data=orjson.dumps(group.task)),
            mode=rollout_pb2.ROLLOUT_MODE_VAL if group.validate else rollout_pb2.ROLLOUT_MODE_TRAIN,
            config=self._rules.message(),
            rollout_id=group.rollout_id(number),
            group_id=group.uid,
            labels=[self._identity.label],
        )

    async def _guarded_watch(self) -> None:
        try:
            async for attempted in self._changes():
                self._note(attempted)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._deliver(error)

    async def _changes(self) -> AsyncIterator[rollout_pb2.AttemptedRollout]:
        """This trainer's rollouts as they change, across restarts of the store."""
        filters = rollout_pb2.RolloutFilter(run_id=self._identity.run_id, labels=[self._identity.label])
        cursor = 0
        while True:
            request = store_pb2.WatchRolloutsRequest(
                filter=filters, cursor=cursor, include_existing=cursor == 0, include_attempts=True
            )
            try:
                stream = self._link.store.WatchRollouts(request)
                self._watching.set()
                async for answer in stream:
                    cursor = max(cursor, answer.cursor)
                    for attempted in answer.rollouts:
                        yield attempted
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.OUT_OF_RANGE:
                    cursor = 0
                elif error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise LearnerError(f"watch rollouts: {error.code().name}: {error.details()}") from error
            # Waits for the store to answer again, with its own patience, before the stream is reopened.
            info = store_pb2.GetServerInfoRequest()
            await self._link.call(self._link.store.GetServerInfo, info, what="reconnect to the store")

    def _note(self, attempted: rollout_pb2.AttemptedRollout) -> None:
        rollout = attempted.rollout
        group = self._open.get(rollout.group_id)
        if group is None or not rollout.sealed:
            return
        group.sealed[rollout.rollout_id] = attempted
        if len(group.sealed) == group.request.size:
            del self._open[rollout.group_id]
            task = asyncio.get_running_loop().create_task(self._guarded_fetch(group))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)

    def describe(self, uids: list[str]) -> str:
        return self._link.run(self._describe(uids))

    async def _describe(self, uids: list[str]) -> str:
        waiting = [self._open[uid] for uid in uids if uid in self._open]
        if not waiting:
            return f"{len(uids)} groups are being read"
        first = waiting[0]
        ids = [first.request.rollout_id(number) for number in range(first.request.size)]
        missing = [rollout_id for rollout_id in ids if rollout_id not in first.sealed]
        request = store_pb2.GetRolloutRequest(rollout_id=missing[0])
        answer = await self._link.call(self._link.store.GetRollout, request, what="get rollout")
        rollout = answer.rollout.rollout
        state = rollout_pb2.RolloutStatus.Name(rollout.status).removeprefix("ROLLOUT_STATUS_").lower()
        worker = answer.rollout.attempt.worker_id or "no worker"
        return (
            f"{len(waiting)} groups are open; the first, {first.request.uid}, waits for {len(missing)} of "
            f"{len(ids)} rollouts, {missing[0]} being {state} ({worker})"
        )

    async def _guarded_fetch(self, group: _OpenGroup) -> None:
        try:
            self._deliver(await self._fetch(group))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._deliver(error)

    async def _fetch(self, group: _OpenGroup) -> FinishedGroup:
        ids = [group.request.rollout_id(number) for number in range(group.request.size)]
        spans, rewards = await asyncio.gather(self._spans(ids), self._rewards(ids))
        rollouts = []
        for rollout_id in ids:
            attempted = group.sealed[rollout_id]
            attempt_id = attempted.rollout.latest_attempt_id
            record = AttemptRecord(
                rollout_id=rollout_id,
                attempt_id=attempt_id,
                group_id=attempted.rollout.group_id,
                spans=[
                    span for span in spans if (span.rollout_id, span.attempt_id) == (rollout_id, attempt_id)
                ],
                rewards=[
                    item for item in rewards if (item.rollout_id, item.attempt_id) == (rollout_id, attempt_id)
                ],
                capture_incomplete=attempted.attempt.capture_incomplete,
            )
            rollouts.append(self._finished(attempted.rollout, build_attempt(record, self._samples)))
        return FinishedGroup(group.request, tuple(rollouts))

    async def _spans(self, ids: list[str]) -> list[span_pb2.StoredSpan]:
        request = store_pb2.ExportSpansRequest(
            run_id=self._identity.run_id, rollout_ids=ids, model_calls_only=True, sealed_only=True
        )

        async def read(message: store_pb2.ExportSpansRequest, **options: Any) -> list[span_pb2.StoredSpan]:
            spans: list[span_pb2.StoredSpan] = []
            async for page in self._link.store.ExportSpans(message, **options):
                spans.extend(page.spans)
            return spans

        return await self._link.call(read, request, what="read spans")

    async def _rewards(self, ids: list[str]) -> list[reward_pb2.Reward]:
        rewards: list[reward_pb2.Reward] = []
        token = ""
        while True:
            request = store_pb2.ListRewardsRequest(rollout_ids=ids, page_size=1000, page_token=token)
            answer = await self._link.call(self._link.store.ListRewards, request, what="read rewards")
            rewards.extend(answer.rewards)
            token = answer.next_page_token
            if not token:
                return rewards

    def _finished(self, rollout: rollout_pb2.Rollout, samples: AttemptSamples) -> FinishedRollout:
        account = samples.account
        return FinishedRollout(
            rollout_id=samples.rollout_id,
            group_id=samples.group_id,
            reward=samples.reward,
            rows=tuple(self._row(sample) for sample in samples.rows),
            failure=_failure(rollout, samples.reward),
            attempt_id=samples.attempt_id,
            captured=account.captured,
            observed=account.observation,
            dropped=dict(account.dropped),
        )

    def _row(self, sample: Sample) -> Row:
        versions = sample.policy_versions
        return Row(
            prompt_ids=sample.prompt_ids.astype(np.int64),
            response_ids=sample.response_ids.astype(np.int64),
            response_mask=sample.response_mask.astype(np.int64),
            logprobs=sample.logprobs,
            policy_versions=np.where(versions < 0, -1, versions - self._offset),
            temperature=sample.temperature,
        )

    def claim(self, step: int, rollout_ids: list[str]) -> ClaimedBatch:
        request = trainer_pb2.ClaimBatchRequest(
            request_id=new_request_id(),
            training_run_id=self._identity.training_run_id,
            trainer_epoch=self._identity.trainer_epoch,
            step=step,
            rollout_ids=rollout_ids,
        )
        answer = self._link.ask(self._link.trainer.ClaimBatch, request, what="claim a batch")
        if answer.unsealed_rollout_ids:
            raise FidelityError(
                f"rollout {answer.unsealed_rollout_ids[0]} is not sealed and cannot be trained"
            )
        entries = []
        for entry in answer.batch.entries:
            if not entry.HasField("reward"):
                raise FidelityError(f"the store froze rollout {entry.rollout_id} without a reward")
            entries.append(BatchEntry(entry.rollout_id, entry.group_id, entry.reward))
        return ClaimedBatch(answer.batch.batch_id, answer.batch.content_hash, tuple(entries))


def _undeliverable(item: FinishedGroup | BaseException) -> None:
    raise LearnerError(f"the source was used before it was started: {item!r}")


def _failure(rollout: rollout_pb2.Rollout, reward: float | None) -> str:
    """Why a rollout cannot be trained; an agent that failed after it was judged can."""
    if rollout.status == rollout_pb2.ROLLOUT_STATUS_SUCCEEDED:
        return ""
    if rollout.status == rollout_pb2.ROLLOUT_STATUS_CANCELLED:
        return "cancelled: the rollout was cancelled"
    kind = attempt_pb2.FailureKind.Name(rollout.failure.kind).removeprefix("FAILURE_KIND_").lower()
    judged = rollout.failure.kind in (attempt_pb2.FAILURE_KIND_AGENT, attempt_pb2.FAILURE_KIND_TRUNCATED)
    if judged and reward is not None:
        return ""
    return f"{kind}: {rollout.failure.message.splitlines()[0] if rollout.failure.message else 'no message'}"
