"""Rollouts from the store: enqueued as groups, awaited through the store's stream, read once sealed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from agl_grpc.client.filters import rollout_filter
from agl_grpc.learner.errors import FidelityError, LearnerError
from agl_grpc.learner.lineage import PolicyLineage
from agl_grpc.learner.rollouts.adoption import OpenGroup, left_behind
from agl_grpc.learner.rollouts.attempts import read_attempts
from agl_grpc.learner.rollouts.groups import (
    Arrival,
    BatchEntry,
    ClaimedBatch,
    Deliver,
    FinishedGroup,
    FinishedRollout,
    GroupRequest,
    Row,
)
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import STEP_LABEL, TrainingIdentity
from agl_grpc.model.enums import FailureKind, ResourceBinding, RolloutMode, RolloutStatus
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import SEED_LABEL, AttemptedRollout, EnqueueRolloutRequest, Rollout, RolloutConfig
from agl_grpc.sample import AttemptFacts, AttemptSamples, Decode, DropReason, Sample, SampleRules
from agl_grpc.sample.wire import rules_to_proto

_READ_AT_ONCE = 64
"""Rollouts that are read by one call: as many as it takes for calls to cost little beside what they read."""


class StoreSource:
    """``RolloutSource`` over the contract.

    Args:
        link: the line to the store.
        identity: training run and epoch; every rollout carries it as a label.
        rules: rules of a rollout's life.
        samples: what is trained of an attempt.
        lineage: steps of policy versions; rows carry steps.
        rewards: by rollout, rewards that an earlier trainer's batches froze; they count.
        seed: from which every rollout's sampling seed is made; None = engines sample as they like.
        binding: which publication of the run's resources a rollout works with; None = the store's default.
        decode: the model's tokenizer, by which breaks between rows are told apart.
    """

    def __init__(
        self,
        link: StoreLink,
        identity: TrainingIdentity,
        *,
        rules: RolloutConfig,
        samples: SampleRules,
        lineage: PolicyLineage | None = None,
        rewards: Mapping[str, Sequence[Reward]] | None = None,
        decode: Decode | None = None,
        seed: int | None = None,
        binding: ResourceBinding | None = None,
    ) -> None:
        self._link = link
        self._client = link.client
        self._identity = identity
        # Of the rollouts that are watched.
        self._labels = identity.labels
        self._deliver: Deliver = _undeliverable
        self._rules = rules
        self._samples = samples
        self._lineage = lineage or PolicyLineage()
        self._frozen = dict(rewards or {})
        self._decode = decode
        self._seed = seed
        self._binding = binding
        self._open: dict[str, OpenGroup] = {}
        self._complete: list[OpenGroup] = []
        self._fetches: set[asyncio.Task[None]] = set()

    def start(self, deliver: Deliver) -> None:
        """Opens the watch; ``deliver`` gets every finished group, and the error that ends the watch."""
        self._deliver = deliver
        self._link.start(self._watch())

    def submit(self, groups: list[GroupRequest]) -> None:
        self._link.run(self._submit(groups))

    async def _submit(self, groups: list[GroupRequest]) -> None:
        found = await left_behind(self._client, self._identity, groups)
        new: list[EnqueueRolloutRequest] = []
        for request in groups:
            group = self._open[request.uid] = OpenGroup(request)
            ids = group.fill(found.get(request.uid, {}))
            new.extend(self._wanted(group.request, rollout_id) for rollout_id in ids)
        if new:
            await self._client.enqueue_many_rollouts(new)
        for places in found.values():
            for each in places.values():
                self._note(each.rollout)

    def _wanted(self, group: GroupRequest, rollout_id: str) -> EnqueueRolloutRequest:
        labels = {**self._identity.labels, STEP_LABEL: str(group.step)}
        if self._seed is not None:
            labels[SEED_LABEL] = str(group.seed(self._seed, rollout_id))
        return EnqueueRolloutRequest(
            input=group.task,
            mode=RolloutMode.VAL if group.validate else RolloutMode.TRAIN,
            config=self._rules,
            rollout_id=rollout_id,
            group_id=group.uid,
            labels=labels,
            binding=self._binding,
        )

    async def _watch(self) -> None:
        mine = rollout_filter(run_id=self._identity.run_id, labels=self._labels)
        changes = self._client.watch_rollouts(filter=mine, include_existing=True, include_attempts=True)
        try:
            async for change in changes:
                for rollout in change.items:
                    self._note(rollout)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._deliver(error)

    def _note(self, rollout: Rollout) -> None:
        group = self._open.get(rollout.group_id or "")
        if group is None or not rollout.sealed:
            return
        if group.note(rollout):
            del self._open[group.request.uid]
            self._complete.append(group)
            if len(self._complete) == 1:
                # Once the whole message is noted: groups that end together are read together.
                asyncio.get_running_loop().call_soon(self._fetch_complete)

    def _fetch_complete(self) -> None:
        groups, self._complete = self._complete, []
        while groups:
            count, rollouts = 1, len(groups[0].members)
            while count < len(groups) and rollouts + len(groups[count].members) <= _READ_AT_ONCE:
                rollouts += len(groups[count].members)
                count += 1
            task = asyncio.get_running_loop().create_task(self._fetch_and_deliver(groups[:count]))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)
            groups = groups[count:]

    def describe(self, uids: list[str]) -> str:
        return self._link.run(self._describe(uids))

    async def _describe(self, uids: list[str]) -> str:
        waiting = [self._open[uid] for uid in uids if uid in self._open]
        if not waiting:
            return f"{len(uids)} groups are being read"
        first = waiting[0]
        ids = first.members
        missing = [rollout_id for rollout_id in ids if rollout_id not in first.sealed]
        if not missing:
            return f"{len(waiting)} groups are open; the first, {first.request.uid}, is being read"
        rollout = await self._client.get_rollout_by_id(missing[0])
        state = rollout.status.value if rollout else "unknown to the store"
        worker = rollout.attempt.worker_id if isinstance(rollout, AttemptedRollout) else None
        return (
            f"{len(waiting)} groups are open; the first, {first.request.uid}, waits for {len(missing)} of "
            f"{len(ids)} rollouts, of which {missing[0]} is {state} (worker: {worker or 'none'})"
        )

    async def _fetch_and_deliver(self, groups: list[OpenGroup]) -> None:
        try:
            again: list[EnqueueRolloutRequest] = []
            for group, finished in zip(groups, await self._fetch(groups), strict=True):
                useless = group.replace_useless(finished.rollouts)
                if not useless:
                    self._deliver(finished)
                    continue
                self._open[group.request.uid] = group
                again += [self._wanted(group.request, each) for each in useless]
            if again:
                await self._client.enqueue_many_rollouts(again)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._deliver(error)

    async def _fetch(self, groups: list[OpenGroup]) -> list[FinishedGroup]:
        rollouts = [group.sealed[rollout_id] for group in groups for rollout_id in group.members]
        samples = await read_attempts(self._client, rollouts, self._samples, self._decode, self._frozen)
        finished = iter([self._finished(*each) for each in zip(rollouts, samples, strict=True)])
        return [
            FinishedGroup(group.request, tuple(itertools.islice(finished, len(group.members))))
            for group in groups
        ]

    def _finished(self, rollout: Rollout, samples: AttemptSamples) -> FinishedRollout:
        account = samples.account
        return FinishedRollout(
            rollout_id=samples.rollout_id,
            group_id=samples.group_id,
            reward=samples.reward,
            rows=tuple(self._row(sample) for sample in samples.rows),
            failure=_failure(rollout, samples),
            attempt_id=samples.attempt_id,
            captured=account.captured,
            observed=account.observation,
            dropped=dict(account.dropped),
            row_starts=dict(samples.row_starts),
            unplaced_rewards=samples.unplaced_rewards,
            facts=samples.facts or AttemptFacts(),
        )

    def _row(self, sample: Sample) -> Row:
        return Row(
            prompt_ids=sample.prompt_ids.astype(np.int64),
            response_ids=sample.response_ids.astype(np.int64),
            response_mask=sample.response_mask.astype(np.int64),
            # Copied, as the others are: torch warns of memory to which nobody may write, as a message's.
            logprobs=sample.logprobs.astype(np.float32),
            policy_versions=self._lineage.steps(sample.policy_versions.astype(np.int64)),
            temperature=sample.temperature,
            turns=tuple((turn.start, turn.end, turn.ret) for turn in sample.turns),
        )

    def claim(self, step: int, rollout_ids: list[str]) -> ClaimedBatch:
        mine = self._identity
        work = self._client.claim_batch(
            mine.training_run_id,
            mine.trainer_epoch,
            step,
            rollout_ids,
            rules=rules_to_proto(self._samples),
        )
        batch = self._link.run(work)
        entries = []
        for entry in batch.entries:
            if entry.reward is None:
                raise FidelityError(f"the store froze rollout {entry.rollout_id} without a reward")
            entries.append(BatchEntry(entry.rollout_id, entry.group_id or "", entry.reward))
        return ClaimedBatch(batch.batch_id, batch.content_hash, tuple(entries))


def _undeliverable(item: Arrival) -> None:
    raise LearnerError(f"the source was used before it was started: {item!r}")


def _failure(rollout: Rollout, samples: AttemptSamples) -> str:
    """Why a rollout cannot be trained; an agent that failed after it was judged can."""
    if rollout.status is RolloutStatus.SUCCEEDED:
        if DropReason.GRADER_FAILED in samples.account.dropped:
            return f"{FailureKind.GRADER.value}: {DropReason.GRADER_FAILED.sentence}"
        return ""
    if rollout.status is RolloutStatus.CANCELLED or rollout.failure is None:
        return f"{rollout.status.value}: no failure was recorded"
    failure = rollout.failure
    if failure.kind in (FailureKind.AGENT, FailureKind.TRUNCATED) and samples.reward is not None:
        return ""
    return f"{failure.kind.value}: {(failure.message.splitlines() or ['no message'])[0]}"
