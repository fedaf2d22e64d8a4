"""What a resumed trainer takes over, without verl: steps of policy versions, and members of a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.client.leases import Completion
from agl_grpc.learner.lineage import PolicyLineage, transfer_name
from agl_grpc.learner.rollouts.adoption import LeftBehind, OpenGroup, left_behind
from agl_grpc.learner.rollouts.attempts import read_attempts
from agl_grpc.learner.rollouts.groups import UNKNOWN_STEP, FinishedRollout, GroupRequest, Row
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import STEP_LABEL, TrainingIdentity, TrainingRun, frozen_rewards
from agl_grpc.model.enums import BatchStatus, FailureKind, PolicyVersionStatus, RolloutMode, RolloutStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.policy import PolicyVersion, WeightSource
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import EnqueueRolloutRequest, Rollout
from agl_grpc.model.training import Batch, ManifestEntry
from agl_grpc.sample import SampleRules
from tests.support.store_process import StoreProcess

MINE = TrainingIdentity("default", "tr", trainer_epoch=2, origin=1)
REQUEST = GroupRequest(uid="tr.t1.s4.i7", index=7, task={}, size=3, step=6)


def test_seeds_depend_on_task_and_place_and_not_on_the_runs_name() -> None:
    def seeds(request: GroupRequest, base: int = 1) -> list[int]:
        return [request.seed(base, request.rollout_id(number)) for number in range(request.size)]

    mine = seeds(REQUEST)
    assert seeds(replace(REQUEST, uid="another.start.t3.s4.i7")) == mine
    # A try again at the same place has the same one.
    assert REQUEST.seed(1, REQUEST.rollout_id(2, again=1)) == mine[2]
    others = [seeds(REQUEST, base=2), seeds(replace(REQUEST, uid="tr.t1.s5.i7"))]
    validation = replace(REQUEST, uid="0a1b", validate=True)
    assert seeds(validation) == seeds(replace(validation, uid="random"))
    everything = [*mine, *others[0], *others[1], *seeds(validation)]
    assert len(set(everything)) == len(everything) == 12


def version(number: int, step: int, digest: str, epoch: int = 1, training: str = "tr") -> PolicyVersion:
    identity = replace(MINE, training_run_id=training, trainer_epoch=epoch)
    return PolicyVersion(
        run_id="default",
        model="m",
        policy_version=number,
        status=PolicyVersionStatus.COMMITTED,
        source=WeightSource(group_id=transfer_name(identity, step, number)),
        weights_digest=digest,
    )


def test_older_versions_are_steps_when_their_weights_are_the_same() -> None:
    older = [version(step, step, f"w{step}") for step in range(1, 7)]
    lineage = PolicyLineage(offset=3, start=4, older=older, training_run_id="tr")
    assert [lineage.step(number) for number in (-1, 0, 1, 4)] == [-1, 0, 1, 4]
    # This trainer's own versions begin with 7; the steps after the checkpoint are not trained again yet.
    assert [lineage.step(number) for number in (7, 8)] == [4, 5]
    assert [lineage.step(number) for number in (5, 6)] == [UNKNOWN_STEP, UNKNOWN_STEP]
    lineage.published(5, "w5")
    lineage.published(6, "other weights")
    assert [lineage.step(number) for number in (5, 6)] == [5, UNKNOWN_STEP]
    assert lineage.steps(np.array([5, -1, 8, 0, 6])).tolist() == [5, -1, 5, 0, UNKNOWN_STEP]


def test_of_a_step_published_twice_the_newer_weights_count_and_other_runs_do_not() -> None:
    older = [version(1, 1, "first"), version(2, 1, "second", epoch=2), version(3, 1, "x", training="tr2")]
    lineage = PolicyLineage(offset=2, start=2, older=older, training_run_id="tr")
    assert [lineage.step(number) for number in (1, 2, 3)] == [UNKNOWN_STEP, 1, UNKNOWN_STEP]


def rollout(number: int, status: RolloutStatus, kind: FailureKind | None = None, again: int = 0) -> Rollout:
    return Rollout(
        rollout_id=REQUEST.rollout_id(number, again),
        status=status,
        group_id=REQUEST.uid,
        labels={STEP_LABEL: "5"},
        failure=None if kind is None else Failure(kind=kind, message="broke"),
        sealed=status.is_terminal,
    )


def finished(rollout_id: str, step: int) -> FinishedRollout:
    ones = np.ones(2, dtype=np.int64)
    row = Row(ones, ones, ones, np.zeros(2, dtype=np.float32), np.full(2, step))
    return FinishedRollout(rollout_id, REQUEST.uid, 1.0, (row,))


def test_a_group_takes_what_is_finished_or_under_way_and_makes_the_rest_anew() -> None:
    group = OpenGroup(REQUEST)
    older = {
        0: LeftBehind(rollout(0, RolloutStatus.SUCCEEDED), 1),
        1: LeftBehind(rollout(1, RolloutStatus.CANCELLED), 1),
        2: LeftBehind(rollout(2, RolloutStatus.FAILED, FailureKind.INFRASTRUCTURE, again=1), 2),
    }
    assert group.fill(older) == ["tr.t1.s4.i7.n1.r1", "tr.t1.s4.i7.n2.r2"]
    assert group.members == ["tr.t1.s4.i7.n0", "tr.t1.s4.i7.n1.r1", "tr.t1.s4.i7.n2.r2"]
    assert group.request.step == 5
    assert [REQUEST.place_of(name) for name in group.members] == [(0, 0), (1, 1), (2, 2)]
    # What was given up does not count, also when the watch brings it late.
    assert not group.note(rollout(1, RolloutStatus.CANCELLED))
    assert not group.note(rollout(0, RolloutStatus.SUCCEEDED))
    assert not group.note(rollout(1, RolloutStatus.SUCCEEDED, again=1))
    assert group.note(rollout(2, RolloutStatus.FAILED, FailureKind.AGENT, again=2))


def test_what_other_weights_have_sampled_is_made_anew() -> None:
    group = OpenGroup(REQUEST)
    live = {number: LeftBehind(rollout(number, RolloutStatus.RUNNING), 1) for number in range(3)}
    assert group.fill(live) == []
    for number in range(3):
        group.note(rollout(number, RolloutStatus.SUCCEEDED))
    found = [finished(name, step) for name, step in zip(group.members, (4, UNKNOWN_STEP, 3), strict=True)]
    assert group.replace_useless(found) == ["tr.t1.s4.i7.n1.r1", "tr.t1.s4.i7.n2.r1"]
    assert not group.note(rollout(1, RolloutStatus.SUCCEEDED, again=1))
    assert group.note(rollout(2, RolloutStatus.SUCCEEDED, again=1))
    # A new try is what it is: it is not made a third time.
    assert group.replace_useless([finished(name, UNKNOWN_STEP) for name in group.members[1:]]) == []


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[StoreClient]:
    with StoreProcess(tmp_path / "store.db") as store:
        async with StoreClient(store.address) as opened:
            yield opened


async def test_unfinished_rollouts_of_later_steps_are_cancelled_and_the_next_ones_found(
    client: StoreClient,
) -> None:
    def wanted(name: str, step: int, origin: int = 1, mode: RolloutMode = RolloutMode.TRAIN) -> None:
        labels = {**replace(MINE, origin=origin).labels, STEP_LABEL: str(step)}
        asked.append(
            EnqueueRolloutRequest(
                input={}, rollout_id=name, group_id=name.partition(".n")[0], labels=labels, mode=mode
            )
        )

    asked: list[EnqueueRolloutRequest] = []
    wanted(REQUEST.rollout_id(0), 5)
    wanted(REQUEST.rollout_id(1), 5)
    wanted("tr.t1.s9.i1.n0", 6)
    wanted("val.n0", 5, mode=RolloutMode.VAL)
    await client.enqueue_many_rollouts(asked)
    link = StoreLink(client.target, "default")
    try:
        for _ in range(2):
            training = await asyncio.to_thread(TrainingRun.acquire, link, "tr")
        training.go_on_from(1)
        assert training.identity == MINE
        assert await asyncio.to_thread(training.discard_leftovers, 4) == 2
        found = await left_behind(client, MINE, [REQUEST])
        # Where other models answer in the same rollouts, those of the next step are too early as well.
        assert await asyncio.to_thread(partial(training.discard_leftovers, 4, alone=False)) == 2
    finally:
        await asyncio.to_thread(link.close)
    assert {number: each.rollout.rollout_id for number, each in found[REQUEST.uid].items()} == {
        0: REQUEST.rollout_id(0),
        1: REQUEST.rollout_id(1),
    }
    assert all(each.is_worth_taking for each in found[REQUEST.uid].values())
    later = replace(REQUEST, uid="tr.t1.s9.i1")
    assert not (await left_behind(client, MINE, [later]))[later.uid][0].is_worth_taking
    # A trainer that began anew has nothing to take over.
    assert await left_behind(client, replace(MINE, origin=2), [REQUEST]) == {}


async def test_what_is_unfinished_when_a_run_has_ended_is_cancelled_and_nothing_of_others(
    client: StoreClient,
) -> None:
    mine = replace(MINE, trainer_epoch=1)
    owners = {"mine.n0": mine, "mine.n1": mine, "other.n0": replace(mine, training_run_id="other")}
    await client.enqueue_many_rollouts(
        [
            EnqueueRolloutRequest(input={}, rollout_id=name, labels={**owner.labels, STEP_LABEL: "8"})
            for name, owner in owners.items()
        ]
    )
    link = StoreLink(client.target, "default")
    try:
        training = await asyncio.to_thread(TrainingRun.acquire, link, "tr")
        assert training.identity == mine
        assert [await asyncio.to_thread(training.cancel_unfinished) for _ in range(2)] == [2, 0]
    finally:
        await asyncio.to_thread(link.close)
    states = {rollout.rollout_id: rollout.status for rollout in await client.query_rollouts()}
    assert states == {
        "mine.n0": RolloutStatus.CANCELLED,
        "mine.n1": RolloutStatus.CANCELLED,
        "other.n0": RolloutStatus.QUEUING,
    }


async def test_a_batch_that_is_made_again_counts_the_rewards_of_steps_that_it_froze(
    client: StoreClient,
) -> None:
    await client.enqueue_many_rollouts([EnqueueRolloutRequest(input={}, rollout_id="r")])
    (leased,) = await client.lease_rollouts("worker", "session", limit=1, wait=5.0)

    def reward(value: float, step: int) -> Reward:
        return Reward(rollout_id="r", attempt_id=leased.attempt_id, value=value, step=step)

    first = Completion(lease=leased.lease, rewards=[reward(1.0, 0), reward(2.0, 1)])
    await client.complete_attempts("worker", [first])
    link = StoreLink(client.target, "default")
    try:
        training = await asyncio.to_thread(TrainingRun.acquire, link, "tr")
        batch = await client.claim_batch("tr", 1, 1, ["r"])
        assert [(each.step, each.value) for each in batch.entries[0].rewards] == [(0, 1.0), (1, 2.0)]
        # A grader thinks again, and the trainer that had claimed the batch is gone.
        await client.put_rewards([reward(9.0, 0)])
        training = await asyncio.to_thread(TrainingRun.acquire, link, "tr")
        training.go_on_from(1)
        released = await asyncio.to_thread(training.released, 0)
    finally:
        await asyncio.to_thread(link.close)
    rules = SampleRules()
    rollouts = [item for item in [await client.get_rollout_by_id("r")] if item is not None]
    (now,) = await read_attempts(client, rollouts, rules)
    (again,) = await read_attempts(client, rollouts, rules, frozen=frozen_rewards(released, rules))
    assert (now.reward, again.reward) == (11.0, 3.0)


def test_a_reward_that_stands_alone_in_a_batch_is_the_one_that_the_rules_name() -> None:
    entry = ManifestEntry(rollout_id="r", attempt_id="a", reward=0.25, reward_revision=3)
    batch = Batch(
        batch_id="b",
        training_run_id="tr",
        run_id="default",
        status=BatchStatus.RELEASED,
        content_hash="",
        entries=[entry, ManifestEntry(rollout_id="without", attempt_id="a")],
        trainer_epoch=1,
        step=1,
    )
    found = frozen_rewards({1: [batch]}, SampleRules(reward_name="exact"))
    assert list(found) == ["r"]
    assert [(each.name, each.value, each.revision) for each in found["r"]] == [("exact", 0.25, 3)]
