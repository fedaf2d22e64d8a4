"""Measures the Python client against a store, for `bench_clients`: `… client_measure HOST:PORT SPANS ROUNDS`.

Prints one JSON object: spans on disk a second, sent in groups of 100 with 64 groups under way, and the
milliseconds of each round trip of a lease, from the credit to the completion on disk.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque

from agl_grpc.client import StoreClient
from agl_grpc.client.lease_events import Delivered
from agl_grpc.client.lease_stream import LeaseStream
from agl_grpc.client.leases import Completion
from agl_grpc.client.span_buffer import SpanAck
from agl_grpc.client.span_streamer import SpanStreamer
from agl_grpc.client.span_wire import SpanGroup
from agl_grpc.model import AttemptStatus, EnqueueRolloutRequest
from agl_grpc.v1 import common_pb2, span_pb2
from benchmarks.clients import on_loop

GROUP = 100
UNDER_WAY = 64
WARM_UP = 50
START = 1_700_000_000_000_000_000


def group_of(at: tuple[str, str], first: int) -> SpanGroup:
    """So many small spans."""
    spans = []
    for number in range(first, first + GROUP):
        span = span_pb2.Span(
            trace_id=b"0123456789abcdef",
            span_id=number.to_bytes(8, "big"),
            name="step",
            start_time_unix_nano=START + number,
            end_time_unix_nano=START + 1000 + number,
        )
        span.attributes.add(key="number", value=common_pb2.AnyValue(int_value=number))
        span.attributes.add(key="text", value=common_pb2.AnyValue(string_value="the quick brown fox"))
        spans.append(span)
    return SpanGroup(rollout_id=at[0], attempt_id=at[1], spans=spans)


async def spans_per_second(client: StoreClient, count: int) -> float:
    """Streams them; the rate until the last is on disk."""
    started = await client.start_rollout({})
    at = (started.rollout_id, started.attempt.attempt_id)
    under_way: deque[asyncio.Future[SpanAck]] = deque()
    async with SpanStreamer(client) as streamer:
        await streamer.send(group_of(at, 1))
        begun = time.perf_counter()
        for first in range(1 + GROUP, count + 1, GROUP):
            if len(under_way) == UNDER_WAY:
                assert not (await under_way.popleft()).rejected
            under_way.append(await streamer.post(group_of(at, first)))
        for ack in under_way:
            assert not (await ack).rejected
        return (count - GROUP) / (time.perf_counter() - begun)


async def round_trips(client: StoreClient, count: int) -> list[float]:
    """Grants a credit, completes what comes, again and again."""
    await client.enqueue_many_rollouts([EnqueueRolloutRequest(input={})] * (count + WARM_UP))
    found = []
    async with LeaseStream(client, worker_id="measure-python") as stream:
        for number in range(count + WARM_UP):
            begun = time.perf_counter()
            stream.grant()
            async for event in stream:
                if isinstance(event, Delivered):
                    done = Completion(lease=event.work.lease, status=AttemptStatus.SUCCEEDED)
                    await stream.complete(done)
                    break
            if number >= WARM_UP:
                found.append(1000 * (time.perf_counter() - begun))
    return found


async def main(target: str, spans: int, rounds: int) -> None:
    """Measures and prints."""
    async with StoreClient(target) as client:
        rate = await spans_per_second(client, spans)
        trips = await round_trips(client, rounds)
    print(json.dumps({"spans_per_second": rate, "round_trips_ms": trips}))


if __name__ == "__main__":
    on_loop(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
