"""Client processes: each runs a coroutine, all begin at the same moment."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import uvloop

from benchmarks.servers import Server

Start = Callable[[], Awaitable[None]]
"""Awaited by a client when it is connected and warm; returns when all are."""


class Outcome(NamedTuple):
    """What all clients did together.

    Attributes:
        results: What each returned.
        client_cpu: Seconds of CPU of all clients since the common start.
        server_cpu: Seconds of CPU of the server since then.
        seconds: Length of the whole.
    """

    results: list[Any]
    client_cpu: float
    server_cpu: float
    seconds: float


def on_loop(work: Any) -> Any:
    """Runs a coroutine on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        return loop.run(work)


def run_clients(
    server: Server, count: int, work: Callable[..., Awaitable[Any]], *arguments: Any, limit: float = 120
) -> Outcome:
    """Runs `work(start, *arguments)` in so many processes; `work` must be importable."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(count + 1)
    processes = [
        context.Process(target=_process, args=(results, barrier, work, arguments), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # a client failed: its result says why
        barrier.wait(limit)
    cpu, begun = server.cpu, time.perf_counter()
    found = []
    for _ in processes:
        result = results.get(timeout=limit)
        if isinstance(result[0], Exception):
            raise result[0]
        found.append(result)
    outcome = (server.cpu - cpu, time.perf_counter() - begun)
    for process in processes:
        process.join()
    return Outcome([result for result, _ in found], sum(cpu for _, cpu in found), *outcome)


def _process(results: Any, barrier: Any, work: Callable[..., Awaitable[Any]], arguments: Any) -> None:
    begun = 0.0

    async def start() -> None:
        nonlocal begun
        await asyncio.to_thread(barrier.wait)
        begun = time.process_time()

    try:
        result = on_loop(work(start, *arguments))
    except Exception as error:
        # Before the others learn of it: the first result is the reason.
        results.put((RuntimeError(f"a client failed: {error!r}"), 0.0))
        barrier.abort()
    else:
        results.put((result, time.process_time() - begun))
