"""The names of Agent Lightning's store against a real one: each face of the client, each back end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.client import (
    AlreadyExists,
    IllegalTransition,
    InvalidRequest,
    NotFound,
    SpansRejected,
    StoreClient,
    Unimplemented,
    rollout_filter,
)
from agl_grpc.model import (
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    Reward,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    WorkerStatus,
)
from tests.client.faces import Faces
from tests.support.databases import backend_of


@pytest.fixture
def client(any_face: Faces) -> StoreClient:
    return any_face.client()


async def test_a_rollout_from_start_to_end(client: StoreClient) -> None:
    before = time.time()
    started = await client.start_rollout(
        {"q": [1, None, "ü"]},
        "train",
        config=RolloutConfig(timeout_seconds=60),
        metadata={"a": 1},
        worker_id="w",
    )
    assert isinstance(started, AttemptedRollout)
    assert started.attempt.sequence_id == 1
    assert started.attempt_credential
    assert before - 1 < started.start_time < time.time() + 1
    updated = await client.update_attempt(started.rollout_id, "latest", status="succeeded")
    assert updated.status is AttemptStatus.SUCCEEDED
    found = await client.get_rollout_by_id(started.rollout_id)
    assert isinstance(found, AttemptedRollout)
    assert (found.status, found.input, found.mode) == (
        RolloutStatus.SUCCEEDED,
        {"q": [1, None, "ü"]},
        RolloutMode.TRAIN,
    )
    assert found.config.timeout_seconds == 60
    assert found.metadata == {"a": 1}
    assert found.attempt.worker_id == "w"
    with pytest.raises(IllegalTransition):
        await client.update_rollout(started.rollout_id, status="running")


async def test_queue_and_dequeue_in_order(client: StoreClient) -> None:
    requests = [EnqueueRolloutRequest(input=n, group_id="g") for n in range(5)]
    queued = await client.enqueue_many_rollouts(requests)
    assert [type(rollout) for rollout in queued] == [Rollout] * 5
    assert {rollout.status for rollout in queued} == {RolloutStatus.QUEUING}
    first = await client.dequeue_rollout("w-1")
    assert first is not None
    rest = await client.dequeue_many_rollouts(limit=10, worker_id="w-2")
    assert [rollout.input for rollout in [first, *rest]] == [0, 1, 2, 3, 4]
    assert await client.dequeue_rollout() is None
    again = await client.start_attempt(first.rollout_id, worker_id="w-3")
    assert again.attempt.sequence_id == 2
    attempts = await client.query_attempts(first.rollout_id, sort_order="desc")
    assert [attempt.sequence_id for attempt in attempts] == [2, 1]
    assert await client.get_latest_attempt(first.rollout_id) == again.attempt
    group = await client.get_group("g")
    assert group is not None
    assert (group.total, group.terminal) == (5, 0)


async def test_lists_read_all_pages(client: StoreClient) -> None:
    await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(2500)])
    everything = await client.query_rollouts()
    assert [rollout.input for rollout in everything] == list(range(2500))
    assert (everything.total, everything.limit, everything.offset) == (2500, -1, 0)
    part = await client.query_rollouts(limit=1500, offset=700, sort_order="desc", sort_by="start_time")
    assert [rollout.input for rollout in part] == list(range(1799, 299, -1))
    assert part.total == 2500
    none = await client.query_rollouts(limit=0)
    assert (list(none), none.total) == ([], 2500)
    assert [r.input for r in await client.query_rollouts(status_in=["queuing"], limit=2, offset=2499)] == [
        2499
    ]
    with pytest.raises(ValueError, match="limit must be >= -1"):
        await client.query_rollouts(limit=-2)


async def test_choices_of_rollouts(client: StoreClient) -> None:
    a = await client.enqueue_rollout(1, rollout_id="mine-a", labels={"gpu": "1"})
    b = await client.start_rollout(2, rollout_id="mine-b")
    assert [r.rollout_id for r in await client.query_rollouts(rollout_id_contains="ne-")] == [
        "mine-a",
        "mine-b",
    ]
    chosen = await client.query_rollouts(
        status_in=["preparing"], rollout_id_in=[a.rollout_id], filter_logic="or"
    )
    assert {r.rollout_id for r in chosen} == {"mine-a", "mine-b"}
    assert [r.rollout_id for r in await client.query_rollouts(rollout_ids=["mine-b"])] == ["mine-b"]
    labelled = await client.query_rollouts(filter=rollout_filter(labels={"gpu": "1"}))
    assert [r.rollout_id for r in labelled] == ["mine-a"]
    with pytest.raises(AlreadyExists):
        await client.enqueue_rollout(3, rollout_id="mine-a")
    assert await client.cancel_rollouts([a.rollout_id, b.rollout_id], reason="enough") == ["mine-a", "mine-b"]
    assert await client.cancel_rollouts([a.rollout_id]) == []


async def test_updates_change_only_what_is_given(client: StoreClient) -> None:
    made = await client.enqueue_rollout({"a": 1}, "train", metadata={"m": 1}, priority=3)
    changed = await client.update_rollout(made.rollout_id, metadata={"m": 2}, mode=None)
    assert (changed.metadata, changed.mode, changed.input, changed.priority) == ({"m": 2}, None, {"a": 1}, 3)
    cleared = await client.update_rollout(made.rollout_id, metadata=None)
    assert cleared.metadata == {}
    with pytest.raises(NotFound, match="ro-unknown"):
        await client.update_rollout("ro-unknown", metadata={})


async def test_waiting(client: StoreClient) -> None:
    rollouts = [await client.start_rollout(n) for n in range(3)]
    ids = [rollout.rollout_id for rollout in rollouts]
    assert await client.wait_for_rollouts(rollout_ids=ids, timeout=0) == []
    waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=[*ids, "ro-unknown"]))
    any_of_them = asyncio.create_task(client.wait_for_rollouts(rollout_ids=ids, any=True))
    await client.update_attempt(ids[2], "latest", status="failed")
    assert [r.rollout_id for r in await asyncio.wait_for(any_of_them, 10)] == [ids[2]]
    begun = time.monotonic()
    assert [r.rollout_id for r in await client.wait_for_rollouts(rollout_ids=ids, timeout=0.1)] == [ids[2]]
    assert time.monotonic() - begun < 5
    for rollout_id in ids[:2]:
        await client.update_attempt(rollout_id, "latest", status="succeeded")
    done = await asyncio.wait_for(waiting, 10)
    assert [(r.rollout_id, str(r.status)) for r in done] == list(
        zip(ids, ["succeeded", "succeeded", "failed"], strict=True)
    )
    grouped = [await client.enqueue_rollout(n, group_id="g") for n in range(2)]
    assert await client.wait_for_rollouts(group_ids=["g", "h"], timeout=0) == []
    waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=ids[:1], group_ids=["g"]))
    await client.cancel_rollouts([one.rollout_id for one in grouped])
    found = await asyncio.wait_for(waiting, 10)
    assert [one.rollout_id for one in found] == [ids[0], *(one.rollout_id for one in grouped)]
    sealed = await client.wait_for_rollouts(rollout_ids=ids, until="sealed", timeout=10)
    assert all(r.sealed for r in sealed)


def _span(rollout: AttemptedRollout, name: str, **fields: Any) -> Span:
    return Span.from_attributes(
        attributes={"n": name},
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt.attempt_id,
        name=name,
        **fields,
    )


async def test_spans(client: StoreClient) -> None:
    one, two = await client.start_rollout(1), await client.start_rollout(2)
    first = _span(one, "first")
    stored = await client.add_span(first)
    assert stored is not None
    assert stored.sequence_id == 1
    assert await client.add_span(first) is None
    assert await client.get_next_span_sequence_id(one.rollout_id, one.attempt.attempt_id) == 2
    mixed = [_span(one, "a"), _span(two, "b"), _span(one, "c", parent_id=first.span_id)]
    assert [span.sequence_id for span in await client.add_many_spans(mixed)] == [3, 1, 4]
    found = await client.query_spans(one.rollout_id, "latest")
    assert [(span.name, span.sequence_id) for span in found] == [("first", 1), ("a", 3), ("c", 4)]
    assert found[0].span_id == first.span_id
    assert found[0].start_time_ns == first.start_time_ns
    children = await client.query_spans(one.rollout_id, parent_id=first.span_id)
    assert [span.name for span in children] == ["c"]
    either = await client.query_spans(
        one.rollout_id, name="a", name_contains="irs", filter_logic="or", limit=1
    )
    assert ([span.name for span in either], either.total) == (["first"], 2)
    exported = [span.span.name async for span in client.export_spans()]
    assert sorted(exported) == ["a", "b", "c", "first"]


async def test_refused_spans_leave_the_others_stored(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    stranger = Span.from_attributes(attributes={}, rollout_id="ro-x", attempt_id="at-x")
    with pytest.raises(ValueError, match="at-x"):
        await client.add_span(stranger)
    with pytest.raises(SpansRejected, match=r"1 of 3 spans were refused, first spans\[1\]") as caught:
        await client.add_many_spans([_span(rollout, "a"), stranger, _span(rollout, "b")])
    ((place, error),) = caught.value.rejections
    assert place == 1
    assert isinstance(error, NotFound)
    assert [span.name for span in caught.value.stored] == ["a", "b"]
    assert [span.name for span in await client.query_spans(rollout.rollout_id)] == ["a", "b"]


async def test_rewards(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    keys = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    first = await client.put_rewards(
        [Reward(**keys, value=0.0), Reward(**keys, value=1.0, name="style", step=2)]
    )
    assert [reward.revision for reward in first] == [1, 1]
    await client.put_rewards([Reward(**keys, value=0.5, metadata={"why": "second look"})])
    newest = {reward.name: reward for reward in await client.query_rewards([rollout.rollout_id])}
    assert (newest["primary"].value, newest["primary"].revision) == (0.5, 2)
    assert newest["primary"].metadata == {"why": "second look"}
    assert newest["style"].step == 2
    assert len(await client.query_rewards([rollout.rollout_id], all_revisions=True)) == 3


async def test_workers(client: StoreClient) -> None:
    assert await client.get_worker_by_id("w") is None
    made = await client.update_worker("w", heartbeat_stats={"cpu": 0.5, "gpus": [{"mem": 1}]})
    assert made.heartbeat_stats == {"cpu": 0.5, "gpus": [{"mem": 1}]}
    kept = await client.update_worker("w")
    assert kept.heartbeat_stats == made.heartbeat_stats
    await client.start_rollout(1, worker_id="busy-1")
    busy = await client.query_workers(status_in=["busy"])
    assert [(w.worker_id, w.status) for w in busy] == [("busy-1", WorkerStatus.BUSY)]
    assert [w.worker_id for w in await client.query_workers(worker_id_contains="w")] == ["w"]


async def test_the_server_tells_about_itself(client: StoreClient, database: Path | str | None) -> None:
    info = await client.get_server_info()
    assert (info.contract_version, info.backend) == ("v1", backend_of(database))
    assert info.max_message_bytes >= 1 << 20
    assert (await client.capabilities())["async_safe"] is True
    assert (await client.require("blobs", "span_streams")).contract_version == "v1"
    with pytest.raises(Unimplemented, match="lacks telepathy,magic") as caught:
        await client.require("blobs", "telepathy", "magic")
    assert caught.value.reason == "METHOD_UNIMPLEMENTED"
    assert caught.value.metadata == {"contract_version": "v1", "missing": "telepathy,magic"}
    await client.start_rollout(1)
    numbers = await client.statistics()
    assert (numbers["total_rollouts"], numbers["total_attempts"], numbers["total_spans"]) == (1, 1, 0)
    assert numbers["rollouts_by_status"]["preparing"] == 1
    assert numbers["uptime"] > 0


async def test_runs_keep_apart(client: StoreClient, any_face: Faces) -> None:
    run = await client.create_run("other")
    assert run.run_id == "other"
    other = any_face.client(run_id="other")
    await other.enqueue_rollout(1)
    assert await client.dequeue_rollout() is None
    paused = await other.pause_dispatch()
    assert paused.paused
    assert await other.dequeue_rollout() is None
    await other.resume_dispatch()
    assert await other.dequeue_rollout() is not None
    changed = await client.update_run("other", metadata={"a": 1}, seal_timeout_seconds=5.0)
    assert (changed.metadata, changed.seal_timeout_seconds) == ({"a": 1}, 5.0)
    assert {run.run_id for run in await client.query_runs()} == {"default", "other"}
    assert await client.get_run_by_id("unknown") is None


async def test_bad_input_is_one_line_that_names_the_field(client: StoreClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.enqueue_rollout(1, rollout_id="no spaces please")
    assert "rollout_id" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="order_by"):
        await client.query_rollouts(sort_by="colour")
