"""What there is a lot of: spans of one rollout read back, memory with many rollouts and workers, over time.

`--minutes 30` makes the soak the long one: lives beside spans at 70 % of what this machine takes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from typing import Any

import grpc

from agl_grpc.client import StoreClient
from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks.clients import on_loop
from benchmarks.database import grown
from benchmarks.figures import Row, figure, median, run
from benchmarks.messages import RUNNER, STORE, Attempt, Calls, plain_span, spec, stream_opening
from benchmarks.servers import Server, folder, store_server
from benchmarks.steady import SHARE, ceiling, steady

SPANS = 2_500
QUEUED = 10_000
WORKERS = 1_000
_AT_ONCE = 500


async def read_back(
    address: str, attempt: Attempt, count: int = SPANS, times: int = 9
) -> tuple[float, float]:
    """Milliseconds to read so many spans of a rollout: the answer's bytes, and the client's objects."""
    calls = Calls(address, False)
    rollout_id, attempt_id = attempt
    for _ in range(count // _AT_ONCE):
        spans = [plain_span(number) for number in range(_AT_ONCE)]
        group = span_pb2.AttemptSpans(rollout_id=rollout_id, attempt_id=attempt_id, spans=spans)
        await calls.append(store.AppendSpansRequest(groups=[group]))
    method = calls.channel.unary_unary(f"{STORE}ListSpans")
    request = store.ListSpansRequest(rollout_id=rollout_id, page_size=10_000).SerializeToString()
    raw, objects = [], []
    async with StoreClient(address) as client:
        for _ in range(times):
            begun = time.perf_counter()
            answer = await method(request)
            raw.append(1000 * (time.perf_counter() - begun))
            begun = time.perf_counter()
            found = await client.query_spans(rollout_id)
            objects.append(1000 * (time.perf_counter() - begun))
            assert len(store.ListSpansResponse.FromString(answer).spans) == len(found) == count
    await calls.channel.close()
    return median(raw), median(objects)


async def crowd(server: Server, queued: int, workers: int) -> float:
    """MiB of the server with so many rollouts queued and workers connected."""
    calls = Calls(server.address, False)
    for _ in range(queued // _AT_ONCE):
        specs = [spec("nobody-serves-this")] * _AT_ONCE
        await calls.enqueue(store.EnqueueRolloutsRequest(request_id=uuid.uuid4().hex, rollouts=specs))
    # Each worker is a process of its own in real life: a connection each.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.address, options=options) for _ in range(workers)]
    streams: list[Any] = []
    for number, channel in enumerate(channels):
        stream = channel.stream_stream(f"{RUNNER}StreamLeases")(wait_for_ready=True)
        await stream.write(stream_opening(f"worker-{number}", "work"))
        streams.append(stream)
    for stream in streams:
        await stream.read()
    used = server.rss
    for stream in streams:
        stream.cancel()
    await asyncio.gather(calls.channel.close(), *(channel.close() for channel in channels))
    return used


def soak(server: Server, attempts: list[Attempt], minutes: float) -> tuple[float, float]:
    """MiB of the server after the first third, and how many more at the end."""
    third = 60 * minutes / 3
    lives = SHARE * ceiling(server, attempts, min(third, 20.0)).lives
    steady(server, attempts, third, lives)
    early = server.rss
    steady(server, attempts, 2 * third, lives)
    return early, server.rss - early


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    rows = []
    with folder() as place:
        database = place / "store.db"
        attempts = grown(database, 0)
        with store_server(database) as server:
            raw, objects = on_loop(read_back(server.address, attempts[0]))
            title = f"{SPANS:,} spans of one rollout"
            rows.append(figure(f"{title} read, the answer's bytes", "ms", raw, "<= 30"))
            rows.append(figure(f"{title} by query_spans, as Python objects", "ms", objects, "<= 30"))
        with store_server(database) as server:
            rows.append(figure("memory of an idle server", "MiB", server.rss))
            used = on_loop(crowd(server, QUEUED, WORKERS))
            title = f"memory with {QUEUED:,} rollouts queued and {WORKERS:,} workers connected"
            rows.append(figure(title, "MiB", used, "<= 200"))
        with store_server(database) as server:
            early, more = soak(server, attempts, options.minutes)
            title = f"memory under load, a third into {options.minutes:g} minutes"
            rows.append(figure(title, "MiB", early))
            rows.append(figure("and growth from there to the end", "MiB", more))
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, minutes=(0.2, "length of the soak")))
