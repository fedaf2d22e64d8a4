"""A steady load on a server: whole lives of rollouts beside a stream of spans, a share of what it can take.

What can be taken is the machine's: clients and server share it, so it is measured where the load runs.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from benchmarks.clients import Outcome, run_clients
from benchmarks.ingest import Kind, stream_spans
from benchmarks.lives import CLIENTS, LOOPS, live_for
from benchmarks.messages import Attempt
from benchmarks.servers import Server

SHARE = 0.7
"""Of the ceiling."""

SPANS_PER_SECOND = 6000
"""Of the stream, at the ceiling and below: half an hour of them leaves room on a small disk."""

_SPANS_PER_MESSAGE = 100
_PATIENCE_SECONDS = 300.0


class Carried(NamedTuple):
    """What a server took.

    Attributes:
        lives: Rollouts from enqueue to completion a second, one call a step.
        spans: Acknowledged spans of the stream.
        server_cpu: Its processor time, in seconds.
        seconds: How long it was.
    """

    lives: float
    spans: int
    server_cpu: float
    seconds: float


def ceiling(server: Server, attempts: list[Attempt], seconds: float) -> Carried:
    """What the server takes at most: each client asks again as soon as it is answered."""
    return _carried(run_clients(server, CLIENTS, _load, server.address, attempts, seconds, 0.0))


def steady(server: Server, attempts: list[Attempt], seconds: float, lives: float) -> Carried:
    """What the server takes of so many lives a second."""
    arguments = (server.address, attempts, seconds, lives / CLIENTS)
    return _carried(run_clients(server, CLIENTS, _load, *arguments, limit=seconds + _PATIENCE_SECONDS))


def _carried(outcome: Outcome) -> Carried:
    lives, spans = zip(*outcome.results, strict=True)
    return Carried(sum(lives), sum(spans), outcome.server_cpu, outcome.seconds)


async def _load(
    start: Any, address: str, attempts: list[Attempt], seconds: float, lives: float
) -> tuple[float, int]:
    """One client's lives a second and acknowledged spans."""
    await start()
    rate = SPANS_PER_SECOND / _SPANS_PER_MESSAGE / CLIENTS
    kind = Kind("spans", _SPANS_PER_MESSAGE, 1, rate)
    (spans, _), done = await asyncio.gather(
        stream_spans(_at_once, address, kind, attempts, seconds),
        live_for(_at_once, address, False, 1, LOOPS, seconds, lives),
    )
    return done, spans


async def _at_once() -> None:
    """The common start has been."""
