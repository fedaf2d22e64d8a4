"""The sink and its spool before a store that is slow, refuses, forgets or goes away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from agl_grpc.interceptor.capture.sink import CapturedCall, CaptureSink
from agl_grpc.interceptor.capture.spool import Spool, SpoolFull, SpoolInUse
from agl_grpc.interceptor.capture.transport import AppendTransport, open_channel
from agl_grpc.v1 import span_pb2
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.waiting import eventually

ATTEMPT = ("ro-1", "at-1")


@pytest.fixture
def scripted() -> Iterator[ScriptedStore]:
    with ScriptedStore() as started:
        yield started


@asynccontextmanager
async def sink_to(
    store: ScriptedStore, folder: Path, limit: int = 10**6, ack: float = 1.0
) -> AsyncIterator[CaptureSink]:
    channel = open_channel(store.address)
    sink = CaptureSink(AppendTransport(channel), Spool(folder, limit), ack_timeout=ack)
    try:
        yield sink
    finally:
        await sink.close()
        await channel.close()


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def cut_off(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def span(tokens: int = 5) -> span_pb2.Span:
    made = span_pb2.Span(span_id=os.urandom(8), name="model_call tiny", start_time_unix_nano=1)
    made.model_call.choices.add(token_ids=range(tokens), logprobs=[-1.0] * tokens)
    return made


def ended(call: span_pb2.Span, prompt: Sequence[int]) -> CapturedCall:
    answers = {choice.index: list(choice.token_ids) for choice in call.model_call.choices}
    return CapturedCall(ATTEMPT, call, prompt, answers)


async def test_a_call_is_in_the_store_when_it_is_durable(scripted: ScriptedStore, tmp_path: Path) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        call = span()
        sink.announce(ATTEMPT, call.span_id, 1)
        await eventually(lambda: call.span_id in scripted.open_calls, what="announcement")
        await asyncio.wait_for(sink.submit(ended(call, [1, 2, 3])), 10)
        assert scripted.prompts[(*ATTEMPT, call.span_id)] == [1, 2, 3]
        assert not scripted.open_calls
        assert sink.counters.delivered == 1


async def test_calls_that_end_in_one_step_of_the_engine_are_one_request(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        waiting, calls = span(), [span() for _ in range(20)]
        for call in (waiting, *calls):
            sink.announce(ATTEMPT, call.span_id, 1)

        async def end(call: span_pb2.Span) -> None:
            await sink.submit(ended(call, [1, 2]))

        await asyncio.wait_for(asyncio.gather(*map(end, calls)), 10)
        (request,) = scripted.requests
        assert sum(len(group.spans) for group in request.groups) == 20
        # The one that is still open is announced with them; of the others that would say nothing.
        opened = [call.span_id for group in request.groups for call in group.open_calls]
        assert opened == [waiting.span_id]


async def test_an_abandoned_call_is_said_even_when_the_store_was_away(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        sink.announce(ATTEMPT, b"12345678", 1)
        await eventually(lambda: scripted.open_calls, what="announcement")
        scripted.stop()
        sink.abandon(b"12345678")
        await eventually(lambda: sink.away, what="away")
        scripted.start()
        await eventually(lambda: scripted.abandoned == [b"12345678"], what="abandonment")


async def test_open_calls_are_announced_again_when_the_store_is_back(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        waiting, over = span(), span()
        scripted.stop()
        sink.announce(ATTEMPT, waiting.span_id, 1)
        await asyncio.wait_for(sink.submit(ended(over, [1])), 10)
        scripted.start()
        await eventually(lambda: waiting.span_id in scripted.open_calls, what="announcement")
        await eventually(lambda: (*ATTEMPT, over.span_id) in scripted.spans, what="spooled call")


async def test_calls_are_durable_on_disk_while_the_store_is_slow(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    scripted.delay = 30.0
    async with sink_to(scripted, tmp_path, ack=0.1) as sink:
        calls = [span() for _ in range(20)]
        await asyncio.wait_for(
            asyncio.gather(*(sink.submit(ended(call, [1, 2])) for call in calls)), timeout=5
        )
        assert sum(path.stat().st_size for path in segments(tmp_path)) > 20 * 20
        scripted.delay = 0.0
        # The redelivery that runs still waits for the slow answer: cut it off.
        scripted.stop()
        scripted.start()
        await eventually(lambda: len(scripted.spans) == 20, what="all calls")
        await eventually(lambda: not sink.away, what="direct delivery again")
    assert not segments(tmp_path)


async def test_a_call_that_ends_during_a_delivery_that_fails_is_not_held(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    scripted.delay, scripted.fail = 0.2, grpc.StatusCode.UNAVAILABLE
    async with sink_to(scripted, tmp_path) as sink:
        call = span()
        sink.announce(ATTEMPT, call.span_id, 1)
        await eventually(lambda: scripted.requests, what="the announcement is on its way")
        assert not sink.away
        await asyncio.wait_for(sink.submit(ended(call, [1])), 5)
        assert sink.counters.spooled == 1
        scripted.delay, scripted.fail = 0.0, None
        await eventually(lambda: (*ATTEMPT, call.span_id) in scripted.spans, what="spooled call")


async def test_a_malformed_call_does_not_hold_up_its_neighbours(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        bad = span()
        del bad.model_call.choices[0].logprobs[0]
        good = [span() for _ in range(3)]
        calls = [good[0], bad, *good[1:]]
        await asyncio.wait_for(asyncio.gather(*(sink.submit(ended(c, [1])) for c in calls)), 10)
        assert {key[2] for key in scripted.spans} == {c.span_id for c in good}
        assert (sink.counters.delivered, sink.counters.rejected) == (3, 1)


async def test_a_base_that_the_store_forgot_is_replaced_by_the_whole_prompt(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        first, second, third = span(), span(), span()
        prompt = list(range(100, 140))
        await asyncio.wait_for(sink.submit(ended(first, prompt)), 10)
        longer = [*prompt, 0, 1, 2, 3, 4, 77]
        await asyncio.wait_for(sink.submit(ended(second, longer)), 10)
        assert list(scripted.spans[(*ATTEMPT, second.span_id)].model_call.prompt.token_ids) == [77]
        scripted.forgetful = True
        await asyncio.wait_for(sink.submit(ended(third, longer)), 10)
        assert scripted.prompts[(*ATTEMPT, third.span_id)] == longer
        assert sink.counters.rejected == 0


async def test_a_batch_refused_as_a_whole_costs_only_the_culprit(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    async with sink_to(scripted, tmp_path) as sink:
        scripted.fail = grpc.StatusCode.INVALID_ARGUMENT
        await asyncio.wait_for(sink.submit(ended(span(), [1])), 10)
        assert (sink.counters.rejected, sink.away) == (1, False)


async def test_a_full_spool_closes_the_gate_and_keeps_running_calls(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    scripted.stop()
    async with sink_to(scripted, tmp_path, limit=400) as sink:
        calls = [span(20) for _ in range(12)]
        for call in calls:
            await asyncio.wait_for(sink.submit(ended(call, [1])), 10)
        assert not sink.accepting()
        assert sink.counters.undurable > 0
        scripted.start()
        await eventually(lambda: len(scripted.spans) == 12, what="all calls, also those kept in memory")
        assert sink.accepting()


async def test_what_is_not_delivered_at_the_end_waits_for_the_next_process(
    scripted: ScriptedStore, tmp_path: Path
) -> None:
    scripted.stop()
    async with sink_to(scripted, tmp_path) as sink:
        await asyncio.wait_for(sink.submit(ended(span(), [1])), 10)
    scripted.start()
    async with sink_to(scripted, tmp_path):
        await eventually(lambda: len(scripted.spans) == 1, what="the call of the process before")


async def test_the_spool_keeps_order_and_survives_a_torn_end(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=10**6, segment_bytes=200)
    records = [bytes([n]) * 50 for n in range(20)]
    for record in records:
        await spool.append(record)
    spool.drop(3)
    await spool.close()
    cut_off(segments(tmp_path)[-1], 10)
    again = Spool(tmp_path, limit=10**6)
    kept = [again.read(entry) for entry in again.peek(100, 10**6)]
    # A segment goes when all of it is delivered; of the torn one only the damaged record is lost.
    assert kept[-1] == records[-2]
    assert kept == records[-1 - len(kept) : -1]
    assert set(records[3:-1]) <= set(kept)
    assert again.damaged == 1
    again.drop(len(kept))
    assert (again.waiting, again.size) == (0, 0)
    await again.close()


async def test_a_spool_folder_has_one_owner_and_a_limit(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=100)
    with pytest.raises(SpoolInUse, match="used by another process"):
        Spool(tmp_path, limit=100)
    await spool.append(b"x" * 200)
    assert spool.full
    with pytest.raises(SpoolFull, match="holds 208 bytes, limit 100"):
        await spool.append(b"y")
    await spool.close()
