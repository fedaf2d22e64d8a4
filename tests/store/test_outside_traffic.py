"""Learning from outside traffic: rollouts that nobody enqueued, whose rewards arrive later and change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agl_grpc.client import StoreClient
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import SftConfig
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.supervised.sft import Trajectories, collect
from agl_grpc.model import Batch, BatchStatus, Reward, Span, TrainingRun
from agl_grpc.model.enums import LogprobSemantics, ModelCallOutcome
from agl_grpc.model.model_call import Choice, ModelCall, PolicyRun, logprobs, token_ids
from agl_grpc.sample import Sample, SampleRules, read_columns, unpack
from tests.support.store_process import StoreProcess

RUN = "production"
RULES = SampleRules(model="served")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path / "store.db") as process:
        yield process


@pytest.fixture
async def service(server: StoreProcess) -> AsyncIterator[StoreClient]:
    """What a production service logs with."""
    async with StoreClient(server.address, run_id=RUN) as client:
        await client.create_run(RUN)
        yield client


async def logged(service: StoreClient, ticket: str, answer: list[int]) -> Reward:
    """One conversation as the service logs it, ended without a reward; answers one to be filled in."""
    started = await service.start_rollout({"ticket": ticket}, "train", rollout_id=ticket)
    place = {"rollout_id": started.rollout_id, "attempt_id": started.attempt.attempt_id}
    call = ModelCall(
        model="served",
        prompt_token_ids=token_ids([1, 2, 3]),
        choices=[
            Choice(
                token_ids=token_ids(answer),
                logprobs=logprobs([-0.5] * len(answer)),
                finish_reason="stop",
                policy_runs=[PolicyRun(0, len(answer), 7)],
            )
        ],
        logprob_semantics=LogprobSemantics.PROCESSED,
        outcome=ModelCallOutcome.COMPLETE,
        mode="train",
    )
    await service.add_span(Span(**place, name="chat", model_call=call))
    await service.update_attempt(**place, status="succeeded")
    return Reward(**place, value=0.0)


async def judged(service: StoreClient, ticket: str, value: float) -> Reward:
    """The reward of a conversation, as someone gives it who knows only the ticket."""
    attempt = await service.get_latest_attempt(ticket)
    assert attempt is not None
    place = {"rollout_id": ticket, "attempt_id": attempt.attempt_id}
    (put,) = await service.put_rewards([Reward(**place, value=value, grader="customer")])
    return put


async def trained(client: StoreClient, name: str, ids: list[str]) -> Batch:
    """A batch of a training run of its own, committed."""
    await client.create_training_run(TrainingRun(training_run_id=name, run_id=RUN, algorithm="own"))
    epoch = (await client.acquire_training_run(name, "trainer")).trainer_epoch
    batch = await client.claim_batch(name, epoch, 1, ids)
    await client.commit_batches(name, epoch, f"ck-{name}", [batch.batch_id], step=1)
    return batch


async def replayed(client: StoreClient, batch: Batch) -> list[Sample]:
    return [
        row
        async for each in client.replay_batch(batch.content_hash)
        for row in unpack(read_columns(each.samples))
    ]


def learned(server: StoreProcess, min_reward: float) -> Trajectories:
    """What `agl-grpc learner --sft` would learn of the run now."""
    link = StoreLink(server.address, RUN)
    try:
        return collect(link, RUN, RULES, SftConfig(min_reward=min_reward))
    finally:
        link.close()


async def test_outside_rollouts_become_samples_once_their_rewards_arrive(
    server: StoreProcess, service: StoreClient
) -> None:
    for number, ticket in enumerate(("t1", "t2", "t3")):
        await logged(service, ticket, [10 + number, 20])
    # Complete and sealed, but nobody has judged them: nothing is trained, and nothing counts as 0.
    with pytest.raises(ConfigError, match="3 succeeded, the best reward is None"):
        learned(server, 0.0)
    await judged(service, "t1", 1.0)
    await judged(service, "t2", 0.0)
    (row,) = learned(server, 0.5).rows
    assert (row.prompt_ids.tolist(), row.response_ids.tolist()) == ([1, 2, 3], [10, 20])
    assert row.response_mask.tolist() == [1, 1]
    assert row.policy_versions.tolist() == [7, 7]
    assert learned(server, 0.0).kept == 2


async def test_a_new_judgement_is_a_revision_and_old_batches_keep_what_they_froze(
    server: StoreProcess, service: StoreClient
) -> None:
    ids = [(await logged(service, ticket, [10, 20])).rollout_id for ticket in ("t1", "t2")]
    first = [await judged(service, "t1", 1.0), await judged(service, "t2", 0.0)]
    old = await trained(service, "before", ids)
    before = await replayed(service, old)
    assert [reward.revision for reward in first] == [1, 1]
    # Days later the other answer turns out to be the good one.
    again = [await judged(service, "t1", -1.0), await judged(service, "t2", 1.0)]
    assert [reward.revision for reward in again] == [2, 2]
    new = await trained(service, "after", ids)
    assert [entry.reward for entry in new.entries] == [-1.0, 1.0]
    assert new.content_hash != old.content_hash
    assert {row.rollout_id for row in learned(server, 0.5).rows} == {ids[1]}
    # The old batch: its rewards, its hash, its rows.
    (kept,) = await service.query_batches("before")
    assert (kept.status, kept.content_hash) == (BatchStatus.COMMITTED, old.content_hash)
    assert [entry.reward for entry in kept.entries] == [1.0, 0.0]
    after = await replayed(service, old)
    assert [(row.rollout_id, row.reward) for row in after] == [(row.rollout_id, row.reward) for row in before]
    revisions = await service.query_rewards(ids, all_revisions=True)
    assert sorted(reward.value for reward in revisions if reward.value is not None) == [-1.0, 0.0, 1.0, 1.0]
