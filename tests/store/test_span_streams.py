"""Span streams through a real server: acknowledgements, fencing, resuming, sealing, back-pressure."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from agl_grpc.client.channel import BROKEN_WRITE
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.errors import RETRY_TRAILER
from agl_grpc.v1 import (
    attempt_pb2,
    common_pb2,
    error_reason_pb2,
    rollout_pb2,
    runner_service_pb2,
    runner_service_pb2_grpc,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)
from tests.store.span_support import append, call_span, group, listed, make_attempts, reason_of, serving, span
from tests.support.waiting import eventually

Request = store_service_pb2.StreamSpansRequest


@pytest.fixture
async def served(database: Path | str | None) -> AsyncIterator[tuple[StoreServer, Any]]:
    async with serving(database) as (server, channel):
        await make_attempts(server, "1", "2")
        yield server, store_service_pb2_grpc.StoreServiceStub(channel)


class Producer:
    """One span stream as a client sees it."""

    def __init__(self, stub: Any, producer_id: str = "p", **metadata: str) -> None:
        self.call = stub.StreamSpans(metadata=tuple(metadata.items()))
        self.producer_id = producer_id

    async def open(self, *, resume: bool = False) -> store_service_pb2.SpanStreamOpened:
        await self.call.write(
            Request(open=store_service_pb2.SpanStreamOpen(producer_id=self.producer_id, resume=resume))
        )
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF, await self.call.code()
        opened: store_service_pb2.SpanStreamOpened = answer.opened
        return opened

    async def send(self, sequence: int, *groups: span_pb2.AttemptSpans) -> None:
        await self.call.write(
            Request(spans=store_service_pb2.SpanStreamMessage(sequence=sequence, groups=groups))
        )

    async def acks(self, until: int) -> list[store_service_pb2.SpanStreamAck]:
        """Acknowledgements up to this message."""
        found = []
        while True:
            answer = await self.call.read()
            assert answer is not grpc.aio.EOF, (await self.call.code(), await self.call.details())
            found.append(answer.ack)
            if answer.ack.sequence >= until:
                return found

    async def failure(self) -> grpc.aio.AioRpcError:
        """The error that ends the stream."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream ended without an error")


async def test_acks_name_messages_on_disk_and_single_rejections(served: tuple[StoreServer, Any]) -> None:
    _, stub = served
    producer = Producer(stub)
    opened = await producer.open()
    assert (opened.epoch, opened.last_sequence) == (1, 0)
    assert opened.max_in_flight_bytes > 0
    good = [span(f"s{number}") for number in range(4)]
    broken = call_span([1], [2, 3])
    broken.model_call.choices[0].logprobs.pop()
    await producer.send(1, group("1", good[0]))
    await producer.send(3, group("9", span()), group("1", good[1], broken, good[2]))
    await producer.send(4, group("2", good[3]), group("1", good[0]))
    acks = await producer.acks(4)
    assert [ack.sequence for ack in acks] == sorted(ack.sequence for ack in acks)
    assert sum(ack.duplicates for ack in acks) == 1
    rejected = {
        (one.sequence, one.span.group_index, one.span.index): one.span.status.reason
        for ack in acks
        for one in ack.rejected
    }
    assert rejected == {
        (3, 0, -1): error_reason_pb2.ERROR_REASON_ENTITY_NOT_FOUND,
        (3, 1, 1): error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED,
    }
    await producer.call.done_writing()
    assert await producer.call.read() is grpc.aio.EOF
    assert await producer.call.code() == grpc.StatusCode.OK
    assert [one.span.name for one in await listed(stub, "1")] == ["s0", "s1", "s2"]
    assert [one.span.name for one in await listed(stub, "2")] == ["s3"]


async def test_prompts_may_build_on_unacknowledged_calls_of_the_stream(
    served: tuple[StoreServer, Any],
) -> None:
    _, stub = served
    producer = Producer(stub)
    await producer.open()
    calls = [call_span([0], [1])]
    await producer.send(1, group("1", calls[0]))
    for number in range(2, 40):
        calls.append(call_span([], [number], base=calls[-1].span_id, base_length=number))
        await producer.send(number, group("1", calls[-1]))
    acks = await producer.acks(39)
    assert not any(ack.rejected for ack in acks)
    prompts = [list(one.span.model_call.prompt.token_ids) for one in await listed(stub, "1")]
    assert prompts == [list(range(number + 1)) if number else [0] for number in [0, *range(1, 39)]]


async def test_a_newer_stream_fences_the_older_and_resumes_it(served: tuple[StoreServer, Any]) -> None:
    _, stub = served
    old = Producer(stub)
    await old.open()
    await old.send(5, group("1", span("a")))
    await old.acks(5)
    new = Producer(stub)
    opened = await new.open(resume=True)
    assert (opened.epoch, opened.last_sequence) == (2, 5)
    error = await old.failure()
    assert error.code() == grpc.StatusCode.ABORTED
    assert reason_of(error) == "STREAM_FENCED"
    await new.send(6, group("1", span("b")))
    await new.acks(6)
    # Without `resume` the numbers begin anew: an old mark must not make new messages look stored.
    fresh = Producer(stub)
    assert (await fresh.open()).last_sequence == 0
    await fresh.send(1, group("1", span("c")))
    await fresh.acks(1)
    again = Producer(stub)
    assert (await again.open(resume=True)).last_sequence == 1
    other = Producer(stub, "q")
    assert (await other.open(resume=True)).last_sequence == 0
    assert [one.span.name for one in await listed(stub, "1")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([Request(spans=store_service_pb2.SpanStreamMessage(sequence=1))], "open"),
        ([Request(open=store_service_pb2.SpanStreamOpen())], "open.producer_id"),
        ([Request(open=store_service_pb2.SpanStreamOpen(producer_id="p"))] * 2, "open"),
        (
            [
                Request(open=store_service_pb2.SpanStreamOpen(producer_id="p")),
                Request(spans=store_service_pb2.SpanStreamMessage(sequence=2)),
                Request(spans=store_service_pb2.SpanStreamMessage(sequence=2)),
            ],
            "spans.sequence",
        ),
    ],
)
async def test_streams_that_break_the_protocol_end(
    served: tuple[StoreServer, Any], requests: Iterable[store_service_pb2.StreamSpansRequest], field: str
) -> None:
    _, stub = served
    producer = Producer(stub)
    for request in requests:
        await producer.call.write(request)
    error = await producer.failure()
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(field)


async def lease(server: StoreServer, channel: grpc.aio.Channel) -> tuple[Any, Any]:
    """A leased rollout and the runner's stub."""
    store = store_service_pb2_grpc.StoreServiceStub(channel)
    runner = runner_service_pb2_grpc.RunnerServiceStub(channel)
    await store.EnqueueRollouts(
        store_service_pb2.EnqueueRolloutsRequest(rollouts=[rollout_pb2.RolloutSpec()])
    )
    answer = await runner.LeaseRollouts(
        runner_service_pb2.LeaseRolloutsRequest(worker_id="w", session_id="s")
    )
    return answer.rollouts[0], runner


async def attempt_of(stub: Any, work: Any) -> attempt_pb2.Attempt:
    answer = await stub.GetAttempt(store_service_pb2.GetAttemptRequest(attempt_id=work.lease.attempt_id))
    found: attempt_pb2.Attempt = answer.attempt
    return found


async def complete(runner: Any, work: Any) -> None:
    done = runner_service_pb2.Completion(
        rollout_id=work.lease.rollout_id,
        attempt_id=work.lease.attempt_id,
        lease_token=work.lease.lease_token,
        status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED,
    )
    answer = await runner.CompleteAttempts(
        runner_service_pb2.CompleteAttemptsRequest(worker_id="w", completions=[done])
    )
    assert not answer.results[0].HasField("error")


async def test_an_attempt_is_sealed_when_its_open_call_has_come(database: Path | str | None) -> None:
    async with serving(database) as (server, channel):
        stub = store_service_pb2_grpc.StoreServiceStub(channel)
        work, runner = await lease(server, channel)
        names = {"rollout_id": work.lease.rollout_id, "attempt_id": work.lease.attempt_id}
        call = call_span([1], [2])
        given_up = span()
        announced = [
            span_pb2.OpenCall(span_id=one.span_id, start_time_unix_nano=one.start_time_unix_nano)
            for one in (call, given_up)
        ]
        await append(stub, span_pb2.AttemptSpans(**names, open_calls=announced))
        attempt = await attempt_of(stub, work)
        assert (attempt.status, attempt.open_calls) == (attempt_pb2.ATTEMPT_STATUS_RUNNING, 2)
        await complete(runner, work)
        assert not (await attempt_of(stub, work)).sealed
        # What begins after the end is late, also an announcement: it is not waited for.
        after = span("after", start_time_unix_nano=time.time_ns() + 10**9, end_time_unix_nano=2**62 - 1)
        after.end_time_unix_nano = after.start_time_unix_nano
        late_call = span_pb2.OpenCall(span_id=b"12345678", start_time_unix_nano=after.start_time_unix_nano)
        await append(stub, span_pb2.AttemptSpans(**names, spans=[after], open_calls=[late_call]))
        await append(stub, span_pb2.AttemptSpans(**names, abandoned_calls=[given_up.span_id]))
        attempt = await attempt_of(stub, work)
        assert (attempt.sealed, attempt.open_calls) == (False, 1)
        waiting = stub.WaitRollouts(
            store_service_pb2.WaitRolloutsRequest(
                rollout_ids=[work.lease.rollout_id], until=store_service_pb2.WAIT_UNTIL_SEALED
            ),
            timeout=10,
        )
        await append(stub, span_pb2.AttemptSpans(**names, spans=[call]))
        assert (await waiting).complete
        attempt = await attempt_of(stub, work)
        assert (attempt.sealed, attempt.open_calls, attempt.capture_incomplete) == (True, 0, False)
        await append(stub, span_pb2.AttemptSpans(**names, spans=[span("too late", start_time_unix_nano=5)]))
        stored = (
            await stub.ListSpans(store_service_pb2.ListSpansRequest(rollout_id=names["rollout_id"]))
        ).spans
        assert [(one.span.name, one.late) for one in stored] == [
            ("after", True),
            ("chat", False),
            ("too late", True),
        ]


async def test_an_agents_credential_reaches_its_own_attempt_only(database: Path | str | None) -> None:
    async with serving(database) as (server, channel):
        stub = store_service_pb2_grpc.StoreServiceStub(channel)
        await make_attempts(server, "1")
        work, _ = await lease(server, channel)
        agent = (("authorization", f"Bearer {work.lease.attempt_credential}"),)
        mine = span_pb2.AttemptSpans(spans=[span("mine")])
        request = store_service_pb2.AppendSpansRequest(groups=[mine, group("1", span("foreign"))])
        answer = await stub.AppendSpans(request, metadata=agent)
        assert answer.stored == 1
        assert answer.rejected[0].status.reason == error_reason_pb2.ERROR_REASON_NOT_PERMITTED
        assert (answer.rejected[0].group_index, answer.rejected[0].index) == (1, -1)
        own = store_service_pb2.ListSpansRequest(rollout_id=work.lease.rollout_id)
        assert [one.span.name for one in (await stub.ListSpans(own)).spans] == ["mine"]
        assert await listed(stub, "1") == []

        async def refusal(call: Any) -> str:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            return reason_of(caught.value)

        assert await refusal(stub.ListSpans(own, metadata=agent)) == "NOT_PERMITTED"
        put = store_service_pb2.PutRewardsRequest(
            rewards=[{"attempt_id": work.lease.attempt_id, "value": 1.0}]
        )
        assert await refusal(stub.PutRewards(put, metadata=agent)) == "NOT_PERMITTED"
        forged = work.lease.attempt_credential[:-4] + "AAAA"
        for wrong in (forged, "agl1.x", "agl1.e30.e30"):
            bearer = (("authorization", f"Bearer {wrong}"),)
            assert await refusal(stub.AppendSpans(request, metadata=bearer)) == "UNAUTHENTICATED"
        # Where the run allows it, an agent judges itself; its producers fence nobody else's.
        await stub.UpdateRun(
            store_service_pb2.UpdateRunRequest(
                run={"run_id": "default", "allow_self_grading": True},
                update_mask={"paths": ["allow_self_grading"]},
            )
        )
        assert (await stub.PutRewards(put, metadata=agent)).rewards[0].value == 1.0
        operator = Producer(stub, "same")
        await operator.open()
        agents = Producer(stub, "same", authorization=agent[0][1])
        assert (await agents.open()).epoch == 1
        await operator.send(1, group("1", span("still open")))
        await operator.acks(1)


async def test_a_full_queue_refuses_calls_and_holds_streams_back(database: Path | str | None) -> None:
    async with serving(database, span_queue_bytes=2000) as (server, channel):
        stub = store_service_pb2_grpc.StoreServiceStub(channel)
        await make_attempts(server, "1", "2")
        producer = Producer(stub)
        await producer.open()
        gate = threading.Event()
        held = server.store.writer.submit(lambda _: gate.wait(10))
        sent = [span("x" * 900) for _ in range(30)]
        sending = asyncio.create_task(send_all(producer, sent))

        async def refusal() -> grpc.aio.AioRpcError | None:
            call = append(stub, group("2", span()))
            try:
                await asyncio.wait_for(call, 1)
            except grpc.aio.AioRpcError as error:
                return error
            except TimeoutError:
                return None  # it was taken and waits for the writer: the queue had room
            raise AssertionError("answered although nothing can be written")

        error = await eventually(refusal, what="the refusal")
        assert error is not None
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(error) == "OVERLOADED"
        trailers = dict(error.trailing_metadata() or ())
        delay = error_details_pb2.RetryInfo.FromString(trailers[RETRY_TRAILER]).retry_delay
        assert delay.ToNanoseconds() > 0
        gate.set()
        assert await held
        await sending
        await producer.acks(30)
        assert [one.span.span_id for one in await listed(stub, "1")] == [one.span_id for one in sent]
        assert (await append(stub, group("2", span()))).stored == 1


async def send_all(producer: Producer, spans: Iterable[span_pb2.Span]) -> None:
    for number, one in enumerate(spans, start=1):
        await producer.send(number, group("1", one))


async def fill(stub: Any, batches: list[list[span_pb2.Span]]) -> int:
    """Store batches until one is refused; how many spans were stored."""
    stored = 0
    for batch in batches:
        stored += (await append(stub, group("1", *batch))).stored
    return stored


async def test_a_full_disk_refuses_writes_and_recovers(tmp_path: Any) -> None:
    config = ServeConfig(port=0, database=tmp_path / "store.db", limit_pages=200)
    server = await StoreServer.start(config)
    try:
        await make_attempts(server, "1")
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = store_service_pb2_grpc.StoreServiceStub(channel)
            padding = [{"key": "k", "value": {"string_value": "v" * 20_000}}]
            batches = [
                [span(f"n{one}-{place}", attributes=padding) for place in range(10)] for one in range(30)
            ]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fill(stub, batches)
            stored = len(await listed(stub, "1", page_size=50))
            assert stored >= 10
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert reason_of(caught.value) == "STORAGE_FULL"
            assert RETRY_TRAILER in dict(caught.value.trailing_metadata())
            error = await eventually(lambda: stream_failure(stub), what="the stream's own status")
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            names = {one.span.name for one in await listed(stub, "1", page_size=50)}
            assert len([name for name in names if name.startswith("n")]) == stored

            def more_room(tx: Any) -> None:
                tx.execute("PRAGMA max_page_count = 100000")

            await server.store.write(more_room)
            assert (await append(stub, group("1", *batches[-1]))).stored == 10
            info = await stub.GetServerInfo(store_service_pb2.GetServerInfoRequest())
            assert info.durability == common_pb2.DURABILITY_DISK
    finally:
        await server.stop()


async def stream_failure(stub: Any) -> grpc.aio.AioRpcError | None:
    """How the store ends a stream on a full disk; None = it ended under a write, which hides the status."""
    producer = Producer(stub)
    await producer.call.write(
        Request(open=store_service_pb2.SpanStreamOpen(producer_id=producer.producer_id))
    )
    padding = [{"key": "k", "value": {"string_value": "v" * 200_000}}]
    with contextlib.suppress(grpc.aio.AioRpcError):
        for number in range(1, 12):
            await producer.send(number, group("1", span(f"p{number}", attributes=padding)))
    error = await producer.failure()
    return None if error.details() == BROKEN_WRITE else error
