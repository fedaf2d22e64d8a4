"""What goes and what stays: deletion by filter, retention in the background, eviction (R24)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from agl_grpc.store.clock import ManualClock
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.rollouts.deletion import STEP
from agl_grpc.store.spans.evict import EvictionLimits
from agl_grpc.v1 import run_pb2, store_service_pb2, trainer_service_pb2, training_pb2
from agl_grpc.v1.rollout_pb2 import RolloutFilter, RolloutSpec
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceStub
from tests.store.rig import FAILED, Rig, reason
from tests.support.waiting import eventually

TABLES = [
    "rollouts",
    "rollout_bodies",
    "attempts",
    "spans",
    "span_sequences",
    "open_calls",
    "rewards",
    "groups",
    "worker_commands",
    "blob_refs",
]


async def counts(rig: Rig) -> dict[str, int]:
    """Rows by table."""

    def read(db: Any) -> dict[str, int]:
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in TABLES}

    return await rig.server.store.read(read)


async def lived(rig: Rig, *ids: str, size: int = 10, run_id: str = "", **spec: Any) -> list[Any]:
    """Finished rollouts with a span and a reward each."""
    await rig.enqueue(*[RolloutSpec(rollout_id=name, **spec) for name in ids], run_id=run_id)
    leased = await rig.lease(limit=len(ids), run_id=run_id)
    for number, one in enumerate(leased, start=1):
        attributes = [{"key": "text", "value": {"string_value": "x" * size}}]
        await rig.span(one.attempt, number, attributes=attributes)
        await rig.complete(one, rewards=[{"value": 1.0}])
    return leased


async def delete(rig: Rig, *, dry_run: bool = False, **fields: Any) -> tuple[int, int]:
    request = store_service_pb2.DeleteRolloutsRequest(filter=RolloutFilter(**fields), dry_run=dry_run)
    answer = await rig.store.DeleteRollouts(request)
    return answer.deleted, answer.kept


async def alive(rig: Rig) -> list[str]:
    request = store_service_pb2.ListRolloutsRequest(filter=RolloutFilter(run_id="*"), page_size=1000)
    return [one.rollout.rollout_id for one in (await rig.store.ListRollouts(request)).rollouts]


async def keep_for(rig: Rig, seconds: int, run_id: str = "default", field: str = "retention") -> None:
    run = run_pb2.Run(run_id=run_id, **{field: duration_pb2.Duration(seconds=seconds)})
    mask = field_mask_pb2.FieldMask(paths=[field])
    await rig.store.UpdateRun(store_service_pb2.UpdateRunRequest(run=run, update_mask=mask))


async def test_deletion_leaves_nothing_behind(rig: Rig) -> None:
    empty = await counts(rig)
    await lived(rig, "a", "b", group_id="g")
    await rig.enqueue(rollout_id="live", group_id="h")
    (held,) = await rig.lease()
    before = await counts(rig)
    assert await delete(rig, dry_run=True) == (2, 1)
    assert await counts(rig) == before
    assert await delete(rig) == (2, 1)
    assert await alive(rig) == ["live"]
    await rig.complete(held)
    assert await delete(rig) == (1, 0)
    assert await counts(rig) == empty
    statistics = await rig.store.GetStatistics(store_service_pb2.GetStatisticsRequest())
    assert (statistics.total_spans, statistics.total_span_bytes, statistics.total_rollouts) == (0, 0, 0)
    # Ids that are free again mean new things, and a group with the old name is a new one.
    await rig.enqueue(rollout_id="a", group_id="g")
    group = (await rig.store.GetGroup(store_service_pb2.GetGroupRequest(group_id="g"))).group
    assert (group.total, group.terminal) == (1, 0)


async def test_deletion_by_age_run_status_and_failure(rig: Rig) -> None:
    clock = rig.clock
    assert isinstance(clock, ManualClock)
    await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="other")))
    await lived(rig, "old")
    clock.advance(100)
    middle = timestamp_pb2.Timestamp()
    middle.FromMicroseconds(clock.now())
    clock.advance(100)
    await lived(rig, "new")
    await lived(rig, "elsewhere", run_id="other")
    await rig.enqueue(rollout_id="bad")
    (leased,) = await rig.lease()
    await rig.complete(leased, status=FAILED, failure={"kind": "FAILURE_KIND_GRADER"})
    assert await delete(rig, failure_kind_in=["FAILURE_KIND_AGENT"]) == (0, 0)
    assert await delete(rig, failure_kind_in=["FAILURE_KIND_GRADER"]) == (1, 0)
    assert await delete(rig, end_time_before=middle) == (1, 0)
    assert await delete(rig, end_time_after=middle, status_in=["ROLLOUT_STATUS_FAILED"]) == (0, 0)
    assert await delete(rig, run_id="other") == (1, 0)
    assert await alive(rig) == ["new"]


async def test_a_large_deletion_takes_many_transactions(rig: Rig) -> None:
    count = 2 * STEP + 7
    started = store_service_pb2.EnqueueRolloutsRequest(rollouts=[RolloutSpec() for _ in range(count)])
    await rig.store.EnqueueRollouts(started)
    cancelled = await rig.store.CancelRollouts(store_service_pb2.CancelRolloutsRequest())
    assert len(cancelled.rollout_ids) == count
    request = store_service_pb2.DeleteRolloutsRequest(request_id="once")
    first = await rig.store.DeleteRollouts(request)
    assert (first.deleted, first.kept) == (count, 0)
    await rig.enqueue(rollout_id="later")
    assert await rig.store.DeleteRollouts(request) == first


async def test_retention_deletes_what_ended_long_ago(rig: Rig) -> None:
    await rig.store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="kept")))
    await rig.enqueue(*[RolloutSpec(rollout_id=f"old-{number}") for number in range(STEP + 5)])
    await rig.store.CancelRollouts(store_service_pb2.CancelRolloutsRequest())
    await lived(rig, "for-ever", run_id="kept")
    await rig.enqueue(rollout_id="live", queue="nobody serves it")
    await keep_for(rig, 3600)
    maintenance = rig.server.store.maintenance
    await maintenance.run_once()
    assert len(await alive(rig)) == STEP + 7
    await rig.advance(3500)
    await lived(rig, "young")
    await rig.advance(200)
    await maintenance.run_once()
    assert await alive(rig) == ["for-ever", "live", "young"]
    await rig.advance(3600)
    await maintenance.run_once()
    assert await alive(rig) == ["for-ever", "live"]


async def claimed(rig: Rig, rollout_ids: Sequence[str]) -> tuple[Any, str]:
    """A batch of rollouts: the trainer's stub and the batch's id."""
    trainer: Any = TrainerServiceStub(rig.channel)
    run = training_pb2.TrainingRun(training_run_id="tr", algorithm="verl")
    await trainer.CreateTrainingRun(trainer_service_pb2.CreateTrainingRunRequest(training_run=run))
    await trainer.AcquireTrainingRun(
        trainer_service_pb2.AcquireTrainingRunRequest(training_run_id="tr", trainer_id="t")
    )
    request = trainer_service_pb2.ClaimBatchRequest(
        training_run_id="tr", trainer_epoch=1, step=1, rollout_ids=rollout_ids
    )
    return trainer, (await trainer.ClaimBatch(request)).batch.batch_id


async def test_batches_pin_what_they_name(rig: Rig) -> None:
    await lived(rig, "pinned", "free")
    trainer, batch = await claimed(rig, ["pinned"])
    assert await delete(rig) == (1, 1)
    await keep_for(rig, 3600, field="replay_retention")
    await rig.advance(7200)
    assert await delete(rig) == (0, 1)
    commit = trainer_service_pb2.CommitBatchesRequest(
        training_run_id="tr", trainer_epoch=1, batch_ids=[batch], checkpoint_id="c", step=1
    )
    await trainer.CommitBatches(commit)
    await rig.advance(3599)
    assert await delete(rig) == (0, 1)
    await rig.advance(2)
    assert await delete(rig) == (1, 0)


@pytest.fixture
async def small() -> AsyncIterator[Rig]:
    """A throw-away store that holds few spans."""
    config = ServeConfig(port=0, database=None, grace=1.0, evict_above=100_000, evict_to=50_000)
    clock = ManualClock()
    rig = Rig(await StoreServer.start(config, clock), clock)
    try:
        yield rig
    finally:
        await rig.close()


async def evicted(rig: Rig, *ids: str) -> list[str]:
    attempts = [(await rig.attempts(name))[0] for name in ids]
    return [one.rollout_id for one in attempts if one.spans_evicted]


async def big_span(rig: Rig, attempt: Any, span_id: int) -> None:
    attributes = [{"key": "text", "value": {"string_value": "x" * 30_000}}]
    await rig.span(attempt, span_id, attributes=attributes)


async def refused(rig: Rig, attempt: Any, span_id: int) -> grpc.aio.AioRpcError | None:
    """Why a large span was refused; None = it is stored."""
    try:
        await big_span(rig, attempt, span_id)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_old_spans_are_evicted_by_whole_attempts(small: Rig) -> None:
    rig = small
    await lived(rig, "a", "b", "c", size=30_000)
    trainer, _ = await claimed(rig, ["b"])
    await rig.enqueue(rollout_id="live")
    (live,) = await rig.lease()
    await big_span(rig, live.attempt, 1)
    await eventually(lambda: evicted(rig, "c"), what="eviction")
    assert await evicted(rig, "a", "b", "c", "live") == ["a", "c"]
    statistics = await rig.store.GetStatistics(store_service_pb2.GetStatisticsRequest())
    assert statistics.total_span_bytes < 100_000
    assert statistics.evicted_attempts == 2
    assert statistics.eviction_threshold_bytes == 100_000
    assert statistics.safe_threshold_bytes == 50_000
    assert statistics.memory_capacity_bytes > 0
    for name in ("b", "live"):
        answer = await rig.store.ListSpans(store_service_pb2.ListSpansRequest(rollout_id=name))
        assert len(answer.spans) == 1
    calls: list[Any] = [
        rig.store.ListSpans(store_service_pb2.ListSpansRequest(rollout_id="a")),
        trainer.ClaimBatch(
            trainer_service_pb2.ClaimBatchRequest(
                training_run_id="tr", trainer_epoch=1, step=2, rollout_ids=["a"]
            )
        ),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert reason(caught.value) == "SPANS_EVICTED"


async def test_a_store_full_of_spans_that_must_stay_refuses_more(small: Rig) -> None:
    rig = small
    await rig.enqueue(rollout_id="live")
    (live,) = await rig.lease()

    numbers = iter(range(1, 1000))
    refusal = await eventually(lambda: refused(rig, live.attempt, next(numbers)), what="a full store")
    assert (refusal.code(), reason(refusal)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    before = await rig.store.ListSpans(store_service_pb2.ListSpansRequest(rollout_id="live"))
    assert len(before.spans) >= 4
    # Once the attempt is over its spans may go, and there is room again.
    await rig.complete(live)
    await rig.enqueue(rollout_id="next")
    (after,) = await rig.lease()

    async def accepted() -> bool:
        return await refused(rig, after.attempt, 1) is None

    await eventually(accepted, what="room")
    assert await evicted(rig, "live") == ["live"]


def test_limits_of_eviction_that_do_not_fit_are_refused() -> None:
    for above, down_to in ((0, None), (10, 11), (-1, None), (10, -1)):
        with pytest.raises(ValueError, match="cannot be evicted"):
            EvictionLimits.choose(above, down_to)
    chosen = EvictionLimits.choose()
    assert 0 < chosen.down_to < chosen.above < chosen.capacity
