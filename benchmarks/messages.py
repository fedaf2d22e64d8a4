"""What clients send: tasks, spans, model calls, and whole messages of span streams with fresh ids."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from agl_grpc.client.channel import OPTIONS
from agl_grpc.model import raw
from agl_grpc.v1 import attempt_pb2, common_pb2, rollout_pb2, span_pb2
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store

SPAN_BYTES = 700
PROMPT, RESPONSE = 1024, 256
STORE, RUNNER = "/agl_grpc.v1.StoreService/", "/agl_grpc.v1.RunnerService/"
_ID_MARK = b"\x12\x08"  # field 2 (span_id), 8 bytes

Unary = Callable[[Any], Awaitable[Any]]
Attempt = tuple[str, str]
"""Ids of a rollout and an attempt."""


class Calls:
    """The methods of a life, on one channel. The peer gets the same bytes and its answers are not read."""

    def __init__(self, address: str, bare: bool) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.bare = bare
        self.start = self._unary(f"{STORE}StartRollout", store.StartRolloutResponse)
        self.enqueue = self._unary(f"{STORE}EnqueueRollouts", store.EnqueueRolloutsResponse)
        self.append = self._unary(f"{STORE}AppendSpans", store.AppendSpansResponse)
        self.lease = self._unary(f"{RUNNER}LeaseRollouts", runner.LeaseRolloutsResponse)
        self.complete = self._unary(f"{RUNNER}CompleteAttempts", runner.CompleteAttemptsResponse)

    def _unary(self, method: str, answer: Any) -> Unary:
        call: Unary = self.channel.unary_unary(
            method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=None if self.bare else answer.FromString,
        )
        return call

    def stream(self, method: str) -> Any:
        """A bidirectional call; requests and answers are bytes."""
        return self.channel.stream_stream(method)(wait_for_ready=True)


def spec(queue: str, data: bytes = b'{"question":"12 + 30"}') -> rollout_pb2.RolloutSpec:
    """A small task."""
    return rollout_pb2.RolloutSpec(
        input=common_pb2.Payload(media_type="application/json", data=data), queue=queue
    )


def lease_request(queue: str, identity: str, limit: int) -> runner.LeaseRolloutsRequest:
    """A long poll of a worker that serves one queue and is called like it."""
    return runner.LeaseRolloutsRequest(
        request_id=identity,
        worker_id=queue,
        session_id=queue,
        work=runner.WorkRequest(queues=[queue]),
        limit=limit,
        wait=Duration(seconds=5),
    )


def stream_opening(worker: str, queue: str, granted: int = 1) -> bytes:
    """The first message of a lease stream."""
    opening = runner.LeaseStreamOpen(
        worker_id=worker, session_id=worker, work=runner.WorkRequest(queues=[queue]), granted=granted
    )
    return runner.StreamLeasesRequest(open=opening).SerializeToString()


def credit(granted: int) -> bytes:
    """A grant of credits on a lease stream."""
    return runner.StreamLeasesRequest(credit=runner.CreditGrant(granted=granted)).SerializeToString()


def completion(lease: attempt_pb2.Lease) -> runner.Completion:
    """A success."""
    return runner.Completion(
        rollout_id=lease.rollout_id,
        attempt_id=lease.attempt_id,
        lease_token=lease.lease_token,
        status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED,
    )


def plain_span(number: int = 0, span_id: bytes | None = None) -> span_pb2.Span:
    """A span of SPAN_BYTES bytes with a handful of attributes and a random id."""
    now = time.time_ns()
    span = span_pb2.Span(
        trace_id=os.urandom(16),
        span_id=span_id or os.urandom(8),
        name=f"step {number}",
        start_time_unix_nano=now,
        end_time_unix_nano=now + 5_000_000,
    )
    while (room := SPAN_BYTES - span.ByteSize()) > 24:
        attribute = span.attributes.add(key=f"attribute.key.{len(span.attributes)}")
        attribute.value.string_value = "x" * max(1, min(48, room - 26))
    return span


def call_span(number: int) -> span_pb2.Span:
    """A model call of PROMPT and RESPONSE tokens with logprobs and a policy version."""
    chance = random.Random(number)
    span = span_pb2.Span(span_id=os.urandom(8), name="chat.completions", start_time_unix_nano=time.time_ns())
    call = span.model_call
    call.model = "bench"
    call.prompt.token_ids.extend(chance.randrange(150_000) for _ in range(PROMPT))
    choice = call.choices.add(finish_reason="stop")
    choice.token_ids.extend(chance.randrange(150_000) for _ in range(RESPONSE))
    choice.logprobs.extend(-chance.random() for _ in range(RESPONSE))
    choice.policy_runs.add(start=0, end=RESPONSE, policy_version=3)
    return span


class SpanMessages:
    """Serialised messages of a span stream with fresh random span ids.

    Args:
        kind: `spans` or `calls`.
        size: Spans of a message.
        groups: Attempts of a message; its spans are spread over them.
        attempts: Attempts to choose from.
    """

    def __init__(self, kind: str, size: int, groups: int, attempts: list[Attempt]) -> None:
        make = call_span if kind == "calls" else plain_span
        made = [make(number) for number in range(size)]
        self._spans = [span.SerializeToString() for span in made]
        # With the id itself: the mark alone may also stand in the random trace id before it.
        self._places = [
            data.index(_ID_MARK + span.span_id) + 2 for data, span in zip(self._spans, made, strict=True)
        ]
        self._groups = groups
        self._attempts = attempts

    def make(self, sequence: int) -> bytes:
        """The message with this number."""
        ids = os.urandom(8 * len(self._spans))
        spans = [
            span[:place] + ids[8 * index : 8 * index + 8] + span[place + 8 :]
            for index, (span, place) in enumerate(zip(self._spans, self._places, strict=True))
        ]
        request = raw.RawStreamSpansRequest()
        request.spans.sequence = sequence
        for number, (rollout_id, attempt_id) in enumerate(random.sample(self._attempts, self._groups)):
            own = spans[number :: self._groups]
            request.spans.groups.add(rollout_id=rollout_id, attempt_id=attempt_id, spans=own)
        data: bytes = request.SerializeToString()
        return data


class SpanStream:
    """An open StreamSpans call; several tasks may send and each wait for its own acknowledgement."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.sent = 0
        self.acked = 0

    async def open(self, producer: str) -> None:
        """Says who sends."""
        opening = store.SpanStreamOpen(producer_id=producer)
        await self._call.write(store.StreamSpansRequest(open=opening).SerializeToString())
        await self._call.read()

    async def send(self, data: bytes) -> None:
        """Sends the message number `sent` + 1."""
        self.sent += 1
        await self._call.write(data)

    async def read(self) -> bool:
        """Takes an acknowledgement in; False = the stream has ended."""
        answer = await self._call.read()
        if answer is grpc.aio.EOF:
            return False
        ack = store.StreamSpansResponse.FromString(answer).ack
        if ack.rejected:
            raise RuntimeError(f"rejected: {ack.rejected[0]}")
        self.acked = max(self.acked, ack.sequence)
        return True

    async def finish(self) -> None:
        """Says that nothing more comes."""
        await self._call.done_writing()
