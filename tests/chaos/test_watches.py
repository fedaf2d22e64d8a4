"""Watches: random histories, a fresh store, a compacted log, many watchers, watchers that do not read."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import grpc
import psutil
import pytest

from agl_grpc.store.storage import maintenance
from agl_grpc.v1 import span_pb2, store_service_pb2, trainer_service_pb2, training_pb2
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from tests.chaos import watches
from tests.store.rig import Rig, error_info
from tests.support.store_process import StoreProcess


@pytest.mark.parametrize("database", ["memory", "postgres"], indirect=True)
async def test_random_writers_and_reconnects_leave_no_gap_and_no_repeat(database: Path | str | None) -> None:
    reconnects = names = 0
    for _ in range(1 if database else 4):
        seed = random.SystemRandom().getrandbits(32)
        print(f"seed {seed}")
        counts = await watches.run(seed, 40, database)
        reconnects += counts.reconnects
        names += counts.names
    assert reconnects > 20
    assert names > 50


def many_spans(rollout_id: str, attempt_id: str, count: int) -> store_service_pb2.AppendSpansRequest:
    """Spans of a kilobyte each."""
    request = store_service_pb2.AppendSpansRequest()
    spans = [span_pb2.Span(span_id=os.urandom(8), name="step", trace_state="x" * 1000) for _ in range(count)]
    request.groups.add(rollout_id=rollout_id, attempt_id=attempt_id, spans=spans)
    return request


@pytest.mark.parametrize("kind", watches.KINDS, ids=lambda kind: kind.name)
async def test_the_position_of_a_fresh_store_is_one_to_watch_from(kind: watches.Kind, rig: Rig) -> None:
    answer = await rig.store.GetLatestResources(store_service_pb2.GetLatestResourcesRequest())
    assert not answer.HasField("resources")
    await watches.Writer(rig, random.Random(1)).one_of_each()
    watch = kind.open(rig, answer.position)
    assert (await watch.read()).checkpoint
    assert kind.seen(await watch.read())
    watch.cancel()


async def test_a_watch_that_wants_none_of_much_moves_its_cursor(rig: Rig) -> None:
    with watches.quick_checkpoints():
        rollouts = rig.store.WatchRollouts(
            store_service_pb2.WatchRolloutsRequest(filter={"group_id_in": ["g"]})
        )
        spans = rig.store.WatchSpans(store_service_pb2.WatchSpansRequest(rollout_ids=["other"]))
        start = (await rollouts.read()).cursor
        assert (await spans.read()).cursor == start
        writer = watches.Writer(rig, random.Random(3))
        busy = asyncio.ensure_future(_write_on(writer))
        for watch in (rollouts, spans):
            while (answer := await watch.read()).cursor == start:
                assert answer.checkpoint
            assert answer.checkpoint
            watch.cancel()
        busy.cancel()


async def _write_on(writer: watches.Writer) -> None:
    while True:
        await writer.one_of_each()


@pytest.mark.parametrize("kind", watches.KINDS, ids=lambda kind: kind.name)
async def test_a_cursor_behind_the_log_is_told_the_oldest_position(kind: watches.Kind, rig: Rig) -> None:
    await watches.Writer(rig, random.Random(2)).one_of_each()
    await rig.advance(25 * 3600)
    await rig.store.PublishResources(store_service_pb2.PublishResourcesRequest())
    assert await rig.server.store.maintenance.exhaust(maintenance.prune_events) > 0
    newest = await watches.last_position(rig)
    statistics = await rig.store.GetStatistics(store_service_pb2.GetStatisticsRequest())
    for cursor in (1, statistics.oldest_position - 2, newest + 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kind.open(rig, cursor).read()
        assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE
        info = error_info(caught.value)
        assert info.reason == "CURSOR_COMPACTED"
        assert info.metadata["oldest_position"] == str(statistics.oldest_position)
    watch = kind.open(rig, statistics.oldest_position - 1)
    assert (await watch.read()).checkpoint
    watch.cancel()


async def test_each_step_of_a_training_run_is_told_once_over_reconnects(rig: Rig) -> None:
    run = training_pb2.TrainingRun(training_run_id="tr", algorithm="verl")
    await rig.trainer.CreateTrainingRun(trainer_service_pb2.CreateTrainingRunRequest(training_run=run))
    await rig.trainer.AcquireTrainingRun(
        trainer_service_pb2.AcquireTrainingRunRequest(training_run_id="tr", trainer_id="t")
    )
    steps, seen, choose = 40, list[int](), random.Random(5)

    async def report() -> None:
        for step in range(1, steps + 1):
            request = trainer_service_pb2.ReportMetricsRequest(training_run_id="tr", trainer_epoch=1)
            request.steps.add(step=step, metrics=[{"name": "reward", "value": float(step)}])
            await rig.trainer.ReportMetrics(request)

    reporting = asyncio.ensure_future(report())
    while len(seen) < steps:
        request = trainer_service_pb2.WatchTrainingRunRequest(training_run_id="tr", from_step=len(seen) + 1)
        watch = rig.trainer.WatchTrainingRun(request)
        for _ in range(choose.randint(1, 4)):
            seen += [one.step for one in (await watch.read()).steps]
            if len(seen) == steps:
                break
        watch.cancel()
    await reporting
    assert seen == list(range(1, steps + 1))


async def test_a_thousand_watchers_get_a_new_version_once(rig: Rig) -> None:
    request = store_service_pb2.WatchResourcesRequest()
    calls = [rig.store.WatchResources(request) for _ in range(1000)]
    for call in calls:
        assert (await call.read()).checkpoint
    for version in (1, 2):
        await rig.store.PublishResources(store_service_pb2.PublishResourcesRequest(resources_id="rs"))
        for call in calls:
            assert [one.version for one in (await call.read()).resources] == [version]
    for call in calls:
        call.cancel()


@pytest.mark.e2e
async def test_watchers_that_do_not_read_cost_the_store_no_growing_memory(tmp_path: Path) -> None:
    watchers, rounds, spans = 100, 6, 3_000
    with StoreProcess(tmp_path / "store.db") as server:
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = StoreServiceStub(channel)
            started = await stub.StartRollout(store_service_pb2.StartRolloutRequest())
            attempt = started.rollout.attempt
            calls = [stub.WatchSpans(store_service_pb2.WatchSpansRequest()) for _ in range(watchers)]
            for call in calls:
                assert (await call.read()).checkpoint
            sizes = []
            for round_ in range(1, rounds + 1):
                for _ in range(spans // 500):
                    await stub.AppendSpans(many_spans(attempt.rollout_id, attempt.attempt_id, 500))
                # One that stood still so far begins to read and gets everything.
                got, late = 0, calls.pop()
                while got < round_ * spans:
                    got += len((await late.read()).spans)
                assert got == round_ * spans
                sizes.append(process.memory_info().rss)
    print("RSS in MiB:", [round(size / 2**20, 1) for size in sizes])
    # After three rounds each stands still with a full window and one message in hand. From there on buffers
    # would take 3 x 3 MB for each of a hundred; SQLite's own page cache may grow to 64 MiB.
    assert sizes[-1] - sizes[2] < 64 << 20
