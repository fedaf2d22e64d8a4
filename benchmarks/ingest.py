"""Clients that stream spans, for the benchmarks that need load of this kind."""

from __future__ import annotations

import asyncio
import os
import time
from typing import NamedTuple

from benchmarks.clients import Outcome, Start, run_clients
from benchmarks.messages import STORE, Attempt, Calls, SpanMessages, SpanStream
from benchmarks.servers import Server

WINDOW = 32
"""Unacknowledged messages of one client."""


class Kind(NamedTuple):
    """What a client sends.

    Attributes:
        kind: `spans` or `calls`.
        size: Spans of a message.
        groups: Attempts of a message.
        rate: Messages a second of one client; 0 = as many as the server takes.
    """

    kind: str
    size: int
    groups: int = 1
    rate: float = 0.0


class Rate(NamedTuple):
    """What came of it: spans a second, and microseconds of CPU for each."""

    spans: float
    server_cpu: float
    client_cpu: float


async def stream_spans(
    start: Start, address: str, kind: Kind, attempts: list[Attempt], seconds: float
) -> tuple[int, float]:
    """Streams for so long; acknowledged spans, and seconds until the last acknowledgement."""
    messages = SpanMessages(kind.kind, kind.size, kind.groups, attempts)
    calls = Calls(address, True)
    stream = SpanStream(calls.stream(f"{STORE}StreamSpans"))
    await stream.open(f"bench-{os.getpid()}")
    await start()
    begun, room = time.perf_counter(), asyncio.Event()

    async def read() -> None:
        try:
            while await stream.read():
                room.set()
        finally:
            # Also when it fails: the sender must not wait for an answer that does not come.
            room.set()

    reading = asyncio.create_task(read())
    while (now := time.perf_counter() - begun) < seconds:
        if kind.rate and (early := stream.sent / kind.rate - now) > 0:
            await asyncio.sleep(early)
        await stream.send(messages.make(stream.sent + 1))
        while stream.sent - stream.acked >= WINDOW and not reading.done():
            room.clear()
            await room.wait()
    await stream.finish()
    await reading
    took = time.perf_counter() - begun
    await calls.channel.close()
    return stream.acked * kind.size, took


def rate_of(server: Server, kind: Kind, attempts: list[Attempt], clients: int, seconds: float) -> Rate:
    """Several client processes at once."""
    return _rate(run_clients(server, clients, stream_spans, server.address, kind, attempts, seconds))


def _rate(outcome: Outcome) -> Rate:
    spans = sum(count for count, _ in outcome.results)
    longest = max(took for _, took in outcome.results)
    return Rate(spans / longest, 1e6 * outcome.server_cpu / spans, 1e6 * outcome.client_cpu / spans)
