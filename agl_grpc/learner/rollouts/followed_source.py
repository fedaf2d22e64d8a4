"""Rollouts that another training run asks for: one rollout that used several models trains each of them.

The run that leads asks for groups as ever. The one that follows walks through the same groups (same tasks,
same seed, so the same ids), reads from each rollout the calls of its own model, and claims them for itself,
with the rollout's reward and group as the leader has them. Which groups make a batch the leader decides: the
follower trains, step by step, those that the leader has claimed. The leader asks for the next step's rollouts
only when its followers' engines serve their weights of this one, so all models are as new as each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from agl_grpc.client.filters import rollout_filter
from agl_grpc.learner.errors import DeadlineError
from agl_grpc.learner.lineage import PolicyLineage
from agl_grpc.learner.rollouts.adoption import OpenGroup
from agl_grpc.learner.rollouts.groups import FinishedGroup, GroupRequest, LeadersBatch
from agl_grpc.learner.rollouts.store_source import StoreSource
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TRAINING_LABEL, TrainingIdentity, batch_groups
from agl_grpc.model.enums import BatchStatus
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import Rollout, RolloutConfig
from agl_grpc.model.training import Batch
from agl_grpc.sample import Decode, SampleRules

_PAUSE_SECONDS = 0.2
_SHORTEST_PAUSE_SECONDS = 0.005


class FollowedSource(StoreSource):
    """``RolloutSource`` that asks for nothing.

    Args:
        link, identity, rules, samples, lineage, rewards, decode: as `StoreSource` takes them.
        leader: the training run that is followed.
        labels: the label of the leader's rollouts.
    """

    def __init__(
        self,
        link: StoreLink,
        identity: TrainingIdentity,
        *,
        rules: RolloutConfig,
        samples: SampleRules,
        lineage: PolicyLineage,
        rewards: Mapping[str, Sequence[Reward]],
        leader: str,
        labels: Mapping[str, str],
        decode: Decode | None = None,
    ) -> None:
        super().__init__(
            link,
            identity,
            rules=rules,
            samples=samples,
            lineage=lineage,
            rewards=rewards,
            decode=decode,
        )
        self._leader = leader
        self._labels = dict(labels)
        # The step whose batch of the leader's is waited for; 0 = none.
        self._wanted_step = 0

    def ask_for_batch(self, step: int, number: int) -> None:
        """Has the leader's ``number``-th batch of a step, from 0, delivered as soon as the leader has claimed
        it.
        """
        self._wanted_step = step
        self._link.start(self._bring_batch(step, number))

    async def _bring_batch(self, step: int, number: int) -> None:
        pause = _SHORTEST_PAUSE_SECONDS
        try:
            while len(found := await self._leaders_batches(step)) <= number:
                # Asked again, as the contract has no watch of batches; the leader is at most a step ahead.
                await asyncio.sleep(pause)
                pause = min(_PAUSE_SECONDS, 1.5 * pause)
            self._wanted_step = 0
            self._deliver(LeadersBatch(step, tuple(batch_groups(found[number]))))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._deliver(error)

    async def _leaders_batches(self, step: int) -> list[Batch]:
        """The leader's batches of a step that were not given back; of several trainers the newest one's."""
        held = [BatchStatus.CLAIMED, BatchStatus.COMMITTED]
        later = await self._client.query_batches(self._leader, status_in=held, from_step=step)
        found = [batch for batch in later if batch.step == step]
        return [batch for batch in found if batch.trainer_epoch == found[-1].trainer_epoch]

    async def _describe(self, uids: list[str]) -> str:
        if self._wanted_step and not any(uid in self._open for uid in uids):
            return (
                f"training run {self._leader}, which this one follows, has claimed no batch for step "
                f"{self._wanted_step}"
            )
        return await super()._describe(uids)

    async def _submit(self, groups: list[GroupRequest]) -> None:
        for request in groups:
            members = [request.rollout_id(number) for number in range(request.size)]
            self._open[request.uid] = OpenGroup(request, members)
        there = rollout_filter(
            run_id=self._identity.run_id, labels=self._labels, group_id_in=[each.uid for each in groups]
        )
        for rollout in await self._client.query_rollouts(filter=there):
            self._note(rollout)

    def _note(self, rollout: Rollout) -> None:
        group = self._open.get(rollout.group_id or "")
        if group is not None:
            group.take_newer(rollout.rollout_id)
        super()._note(rollout)

    async def _fetch(self, groups: list[OpenGroup]) -> list[FinishedGroup]:
        # As old as it is to the leader, whose trainer before this one may have asked for it.
        for group in groups:
            group.date_back(group.sealed.values())
        return await super()._fetch(groups)


def leaders_origin(link: StoreLink, run_id: str, leader: str, deadline: float) -> int:
    """The epoch from which the leader's rollouts are named, once there is one.

    Raises:
        DeadlineError: the leader has asked for nothing within ``deadline`` seconds.
    """
    return link.run(_leaders_origin(link, run_id, leader, deadline))


async def _leaders_origin(link: StoreLink, run_id: str, leader: str, deadline: float) -> int:
    try:
        async with asyncio.timeout(deadline):
            while True:
                record = await link.client.get_training_run_by_id(leader)
                for origin in range(record.trainer_epoch if record else 0, 0, -1):
                    mine = rollout_filter(run_id=run_id, labels={TRAINING_LABEL: f"{leader}/{origin}"})
                    if await link.client.query_rollouts(filter=mine, limit=1):
                        return origin
                # Waited for once, at the start; a training run that does not exist cannot be watched.
                await asyncio.sleep(_PAUSE_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(
            f"training run {leader}, which this one follows, has asked for no rollouts within {deadline:g} s"
        ) from error
