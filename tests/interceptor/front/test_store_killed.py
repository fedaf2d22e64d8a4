"""A store that is killed while agents work: it costs no rollout a call, whoever is back first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from agl_grpc.client import StoreClient
from agl_grpc.client.leases import Completion, LeasedRollout
from agl_grpc.model import EnqueueRolloutRequest, Reward, Rollout, RolloutMode, TrainingRun
from agl_grpc.model.enums import RolloutStatus
from agl_grpc.sample import Sample, SampleRules, read_columns, unpack
from agl_grpc.sample.wire import rules_to_proto
from tests.interceptor.front.fake_engine import TOKENS, FakeEngine
from tests.interceptor.front.rig import Rig, proxy_before
from tests.runner.gateway import Gateway
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

SEAL_TIMEOUT = 6.0
"""Seconds; shorter than the store's grace, so that the test is too. The proxy is back within some two."""


async def test_its_calls_are_trained_though_their_worker_is_back_before_their_interceptor(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with StoreProcess(tmp_path / "store.db") as server:
        async with (
            Gateway(server.address) as way,
            StoreClient(server.address) as store,
            proxy_before(way.address, tmp_path, engine, logprobs_mode="processed") as rig,
        ):
            await store.update_run("default", seal_timeout_seconds=SEAL_TIMEOUT)
            old = await _leased(store, 2)
            await _call(rig, old[0])
            await eventually(lambda: rig.state()["delivered"] == 1, what="the first call is stored")
            server.kill()
            for work in (*old, *old):
                await _call(rig, work)
            await eventually(lambda: rig.state()["store_away"], what="the proxy sees that the store is away")
            # From here on the proxy's next try is still to come, however soon the worker is back.
            way.denied.add("AppendSpans")
            server.start()
            await _completed(store, old)
            # Neither does an attempt lose its calls that begins and ends meanwhile.
            (young,) = await _leased(store, 1)
            await _call(rig, young)
            await _completed(store, [young])
            assert rig.state()["spool_waiting"] == 5
            way.denied.clear()
            works = [*old, young]
            ids = [work.lease.rollout_id for work in works]
            over = await store.wait_for_rollouts(rollout_ids=ids, timeout=1)
            assert len(over) == 3, "only the seal is put off"
            sealed = await store.wait_for_rollouts(rollout_ids=ids, timeout=20, until="sealed")
            assert [rollout.status for rollout in sealed] == [RolloutStatus.SUCCEEDED] * 3
            stored = [span async for span in store.export_spans(rollout_ids=ids)]
            rows = await _samples(store, ids)
    assert [span.late for span in stored] == [False] * 6
    trained = Counter[str]()
    for row in rows:
        trained[row.rollout_id] += int(row.response_mask.sum())
    assert trained == {ids[0]: 3 * len(TOKENS), ids[1]: 2 * len(TOKENS), ids[2]: len(TOKENS)}


async def _leased(store: StoreClient, count: int) -> list[LeasedRollout]:
    """So many new rollouts of one group, leased."""
    wanted = [EnqueueRolloutRequest(input=1, mode=RolloutMode.TRAIN, group_id="g") for _ in range(count)]
    await store.enqueue_many_rollouts(wanted)
    leased = await store.lease_rollouts("w", "s", limit=count)
    assert len(leased) == count
    return leased


async def _call(rig: Rig, work: LeasedRollout) -> None:
    """One model call of an agent."""
    answer = await rig.chat(rig.base(work.lease.rollout_id, work.attempt_id))
    assert answer.status_code == 200


async def _completed(store: StoreClient, works: list[LeasedRollout]) -> None:
    done = []
    for work in works:
        reward = Reward(rollout_id=work.lease.rollout_id, attempt_id=work.attempt_id, value=1.0)
        done.append(Completion(lease=work.lease, rewards=[reward]))
    for answer in await store.complete_attempts("w", done):
        assert isinstance(answer, Rollout), answer
        assert answer.status is RolloutStatus.SUCCEEDED


async def _samples(store: StoreClient, ids: list[str]) -> list[Sample]:
    """What a learner gets of these rollouts."""
    await store.create_training_run(TrainingRun(training_run_id="tr", algorithm="own"))
    epoch = (await store.acquire_training_run("tr", "trainer")).trainer_epoch
    batch = await store.claim_batch("tr", epoch, 1, ids, rules=rules_to_proto(SampleRules()))
    return [
        row
        async for answer in store.stream_batch(batch.batch_id)
        for row in unpack(read_columns(answer.samples))
    ]
