"""A learner that follows another trains the groups that the other has claimed, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue

import pytest

from agl_grpc.learner.lineage import PolicyLineage
from agl_grpc.learner.rollouts.followed_source import FollowedSource
from agl_grpc.learner.rollouts.groups import Arrival, LeadersBatch, group_uid, place_of
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TrainingRun
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import RolloutConfig
from agl_grpc.sample import SampleRules
from tests.support.store_process import StoreProcess


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with StoreProcess(tmp_path_factory.mktemp("store") / "store.db") as store:
        yield store.address


@pytest.fixture
def link(address: str) -> Iterator[StoreLink]:
    with closing(StoreLink(address, "default")) as opened:
        yield opened


class Leader:
    """The training run that is followed."""

    def __init__(self, link: StoreLink, name: str) -> None:
        self._link, self._name = link, name
        self._training = TrainingRun.acquire(link, name)

    def claim(self, step: int, *groups: str) -> str:
        """Claims a batch of one rollout a group; its id."""
        ids = [self._link.run(self._sealed(group)) for group in groups]
        epoch = self._training.identity.trainer_epoch
        return self._link.run(self._link.client.claim_batch(self._name, epoch, step, ids)).batch_id

    def release(self, batch_id: str) -> None:
        epoch = self._training.identity.trainer_epoch
        self._link.run(self._link.client.release_batches(self._name, epoch, [batch_id]))

    async def _sealed(self, group: str) -> str:
        client = self._link.client
        rollout = await client.start_rollout(1, "train", group_id=group)
        keys = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        await client.put_rewards([Reward(**keys, value=1.0)])
        await client.update_attempt(**keys, status="succeeded")
        return rollout.rollout_id


class Follower:
    """What follows it, and what is delivered to that."""

    def __init__(self, link: StoreLink, leader: str) -> None:
        self._arrived: SimpleQueue[Arrival] = SimpleQueue()
        self.source = FollowedSource(
            link,
            TrainingRun.acquire(link, f"{leader}-follower").identity,
            rules=RolloutConfig(),
            samples=SampleRules(),
            lineage=PolicyLineage(),
            rewards={},
            leader=leader,
            labels={"of": leader},
        )
        self.source.start(self._arrived.put)

    def next(self) -> Arrival:
        return self._arrived.get(timeout=60.0)

    @property
    def has_nothing(self) -> bool:
        return self._arrived.empty()


def test_the_leaders_batches_arrive_when_they_are_claimed_in_its_order(link: StoreLink) -> None:
    leader, follower = Leader(link, "first"), Follower(link, "first")
    leader.claim(1, "a", "b")
    follower.source.ask_for_batch(2, 0)
    assert follower.source.describe([]) == (
        "training run first, which this one follows, has claimed no batch for step 2"
    )
    leader.claim(3, "later")
    assert follower.has_nothing
    leader.claim(2, "d", "c")
    assert follower.next() == LeadersBatch(2, ("d", "c"))
    # One that is behind gets what was claimed before.
    follower.source.ask_for_batch(1, 0)
    assert follower.next() == LeadersBatch(1, ("a", "b"))
    # A step of several batches.
    follower.source.ask_for_batch(2, 1)
    leader.claim(2, "e")
    assert follower.next() == LeadersBatch(2, ("e",))


def test_what_the_leader_gave_back_or_made_anew_is_not_trained(link: StoreLink) -> None:
    leader, follower = Leader(link, "second"), Follower(link, "second")
    leader.release(leader.claim(1, "given back"))
    follower.source.ask_for_batch(1, 0)
    leader.claim(1, "kept")
    assert follower.next() == LeadersBatch(1, ("kept",))
    # A newer trainer of the same training run comes to the step once more.
    Leader(link, "second").claim(1, "anew")
    follower.source.ask_for_batch(1, 0)
    assert follower.next() == LeadersBatch(1, ("anew",))


def test_a_leader_that_is_not_there_is_an_error_of_the_wait(link: StoreLink) -> None:
    follower = Follower(link, "nobody")
    follower.source.ask_for_batch(1, 0)
    arrived = follower.next()
    assert isinstance(arrived, Exception)
    assert "nobody" in str(arrived)


def test_a_groups_id_names_its_place() -> None:
    assert place_of(group_uid("tr-s1.i2.t3", 14, 7)) == 14
