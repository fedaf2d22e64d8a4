"""Spans over one stream: acknowledged when on disk, exactly once through every fault."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from agl_grpc.client import (
    InvalidRequest,
    NotFound,
    SpanGroup,
    SpanRejection,
    SpanStreamer,
    StoreClient,
    StreamFenced,
)
from agl_grpc.client.span_wire import EncodedGroup, encode_group, encode_groups, encode_message
from agl_grpc.model import AttemptedRollout, Durability, Span
from agl_grpc.store.door.app import StoreServer
from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as pb
from tests.client.flaky import FlakyProxy
from tests.support.waiting import eventually


def _span(rollout: AttemptedRollout, name: str = "step", size: int = 0) -> Span:
    return Span.from_attributes(
        attributes={"filling": "x" * size},
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt.attempt_id,
        name=name,
    )


def _group(rollout: AttemptedRollout, *spans: Span | span_pb2.Span | bytes) -> SpanGroup:
    return SpanGroup(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, spans=spans)


async def _names(client: StoreClient, rollout: AttemptedRollout) -> list[str]:
    return [span.name for span in await client.query_spans(rollout.rollout_id)]


def test_messages_are_the_contracts_own_bytes() -> None:
    call = span_pb2.OpenCall(span_id=b"12345678", start_time_unix_nano=5)
    span = Span(rollout_id="r", attempt_id="a", name="n")
    group = SpanGroup(
        rollout_id="r" * 300,
        attempt_id="a",
        spans=[span, span.to_proto()],
        open_calls=[call],
        abandoned_calls=[b"1"],
    )
    (encoded,) = encode_group(group)
    assert isinstance(encoded, EncodedGroup)
    data = encode_message(2**40, encode_groups([[encoded]]))
    message = pb.StreamSpansRequest.FromString(data)
    expected = span_pb2.AttemptSpans(
        rollout_id="r" * 300,
        attempt_id="a",
        spans=[span.to_proto(), span.to_proto()],
        open_calls=[call],
        abandoned_calls=[b"1"],
    )
    assert message == pb.StreamSpansRequest(spans=pb.SpanStreamMessage(sequence=2**40, groups=[expected]))
    assert not encoded.mergeable


def test_large_groups_travel_in_parts() -> None:
    span = Span(rollout_id="r", attempt_id="a", name="n").to_proto().SerializeToString()
    parts = [*encode_group(SpanGroup(rollout_id="r", attempt_id="a", spans=[span] * 2500))]
    assert all(isinstance(part, EncodedGroup) for part in parts)
    assert [(part.first_span, part.span_count) for part in parts] == [(0, 1000), (1000, 1000), (2000, 500)]
    big = Span(rollout_id="r", attempt_id="a", name="n", attributes={"x": "y" * 600_000}).to_proto()
    assert len(list(encode_group(SpanGroup(rollout_id="r", attempt_id="a", spans=[big] * 3)))) == 3


async def test_an_ack_means_stored(client: StoreClient, database: Path | str | None) -> None:
    rollout = await client.start_rollout(1)
    async with SpanStreamer(client) as streamer:
        ack = await streamer.send(_group(rollout, _span(rollout, "a"), _span(rollout, "b").to_proto()))
        assert await _names(client, rollout) == ["a", "b"]
        assert ack.rejected == ()
        assert ack.durability is (Durability.MEMORY if database is None else Durability.DISK)
        assert streamer.buffered_bytes == 0
        assert (await streamer.send([])).rejected == ()


async def test_refused_spans_are_told_to_their_sender_alone(client: StoreClient) -> None:
    rollout, other = await client.start_rollout(1), await client.start_rollout(2)
    told: list[SpanRejection] = []
    bad = _span(rollout).to_proto()
    bad.span_id = b"\0" * 8
    async with SpanStreamer(client, on_rejected=told.append) as streamer:
        sends = [
            streamer.send(_group(other, _span(other, "before"))),
            streamer.send([_group(rollout, _span(rollout, "a"), bad, _span(rollout, "b")), _group(other)]),
            streamer.send(SpanGroup(rollout_id="ro-x", attempt_id="at-x", spans=[_span(rollout)])),
            streamer.send(_group(rollout, _span(rollout, "c"))),
        ]
        before, mixed, stranger, after = await asyncio.gather(*sends)
    assert (before.rejected, after.rejected) == ((), ())
    ((place, error),) = [((r.group_index, r.index), r.error) for r in mixed.rejected]
    assert place == (0, 1)
    assert isinstance(error, InvalidRequest)
    assert isinstance(stranger.rejected[0].error, NotFound)
    assert set(told) == {*mixed.rejected, *stranger.rejected}
    assert await _names(client, rollout) == ["a", "b", "c"]


async def test_a_span_that_is_too_large_harms_nobody_else(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    huge = _span(rollout, "huge", size=5 * 1024 * 1024)
    async with SpanStreamer(client) as streamer:
        ack = await streamer.send(_group(rollout, _span(rollout, "a"), huge, _span(rollout, "b")))
        ((place, span_id),) = [(rejection.index, rejection.span_id.hex()) for rejection in ack.rejected]
        assert (place, span_id) == (1, huge.span_id)
        assert "at most 4194304 are allowed" in str(ack.rejected[0].error)
        assert len((await streamer.send(_group(rollout, huge))).rejected) == 1
    assert await _names(client, rollout) == ["a", "b"]


async def test_exactly_once_through_cut_connections(store: StoreServer, client: StoreClient) -> None:
    seed = int(os.environ.get("AGL_GRPC_TEST_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    rollouts = [await client.start_rollout(n) for n in range(8)]
    acknowledged: list[str] = []

    async with FlakyProxy(store.address) as proxy:
        through = StoreClient(proxy.address)
        streamer = SpanStreamer(through, linger=0.0).start()

        async def produce(rollout: AttemptedRollout) -> None:
            for _ in range(60):
                spans = [_span(rollout, size=chance.choice([0, 2000])) for _ in range(chance.randint(1, 5))]
                ack = await streamer.send(_group(rollout, *spans))
                assert ack.rejected == ()
                acknowledged.extend(span.span_id for span in spans)

        async def break_often(producers: asyncio.Future[list[None]]) -> None:
            broken = 0
            while not producers.done():
                seen = len(acknowledged)
                await eventually(lambda: producers.done() or len(acknowledged) > seen + 60, what="progress")  # noqa: B023  # awaited at once
                proxy.cut(refuse=broken % 3 == 2)
                broken += 1
                await asyncio.sleep(0.01)
                proxy.accept()
            assert broken > 5

        producing = asyncio.gather(*map(produce, rollouts))
        await asyncio.gather(break_often(producing), producing)
        await streamer.close()
        await through.close()
        assert proxy.connections > 5
    found = [span for rollout in rollouts for span in await client.query_spans(rollout.rollout_id)]
    stored = Counter(span.span_id for span in found)
    assert set(stored.values()) == {1}
    assert set(stored) == set(acknowledged)


async def test_the_newest_stream_of_a_producer_wins(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    old = SpanStreamer(client, producer_id="p").start()
    await old.send(_group(rollout, _span(rollout, "old")))
    async with SpanStreamer(client, producer_id="p") as new:
        await new.send(_group(rollout, _span(rollout, "new")))
        with pytest.raises(StreamFenced):
            await asyncio.wait_for(old.send(_group(rollout, _span(rollout, "too late"))), 10)
    with pytest.raises(StreamFenced):
        await old.flush()
    await old.close()
    assert await _names(client, rollout) == ["old", "new"]


async def test_memory_is_bounded_while_the_store_is_away(store: StoreServer, client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    async with FlakyProxy(store.address) as proxy:
        through = StoreClient(proxy.address)
        proxy.cut(refuse=True)
        streamer = SpanStreamer(through, max_buffer_bytes=100_000).start()
        posted = 0

        async def fill() -> None:
            nonlocal posted
            for _ in range(50):
                await streamer.post(_group(rollout, _span(rollout, size=10_000)))
                posted += 1

        filling = asyncio.create_task(fill())
        await eventually(lambda: posted >= 9, what="a full buffer")
        thread = threading.Thread(
            target=lambda: streamer.submit(_group(rollout, _span(rollout, "of a thread", size=10_000)))
        )
        thread.start()
        for _ in range(20):
            await asyncio.sleep(0)
        assert posted < 12
        assert streamer.buffered_bytes <= 100_000
        proxy.accept()
        await asyncio.wait_for(filling, 20)
        await asyncio.to_thread(thread.join, 20)
        await streamer.close()
        await through.close()
    names = await _names(client, rollout)
    assert len(names) == 51
    assert "of a thread" in names


async def test_threads_hand_spans_over(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    async with SpanStreamer(client) as streamer:

        def work() -> None:
            futures = [streamer.submit(_group(rollout, _span(rollout))) for _ in range(50)]
            assert all(future.result(10).rejected == () for future in futures)

        await asyncio.gather(*(asyncio.to_thread(work) for _ in range(4)))
    assert len(await _names(client, rollout)) == 200


async def test_announced_calls_keep_their_attempt_unsealed(client: StoreClient) -> None:
    rollout = await client.start_rollout(1)
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    calls = [os.urandom(8), os.urandom(8)]
    async with SpanStreamer(client) as streamer:
        for span_id in calls:
            await streamer.announce(*ids, span_id, 1)
        ended = await client.update_attempt(*ids, status="succeeded")
        assert (ended.sealed, ended.open_calls) == (False, 2)
        span = _span(rollout).to_proto()
        span.span_id, span.start_time_unix_nano = calls[0], 1
        span.model_call.model = "m"
        await streamer.send(_group(rollout, span))
        await streamer.abandon(*ids, calls[1])
    sealed = await client.get_latest_attempt(rollout.rollout_id)
    assert sealed is not None
    assert (sealed.sealed, sealed.open_calls, sealed.capture_incomplete) == (True, 0, False)


async def test_closing_while_the_store_is_away_says_what_was_given_up(nowhere: str) -> None:
    client = StoreClient(nowhere)
    streamer = SpanStreamer(client).start()
    future = await streamer.post(SpanGroup(rollout_id="r", attempt_id="a", spans=[b""]))
    with pytest.raises(TimeoutError):
        await streamer.close(timeout=0.1)
    with pytest.raises(RuntimeError, match="closed"):
        await future
    with pytest.raises(RuntimeError, match="closed"):
        await streamer.send(SpanGroup(rollout_id="r", attempt_id="a"))
    await client.close()
