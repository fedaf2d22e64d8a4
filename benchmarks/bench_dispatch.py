"""How soon things arrive: work at waiting workers, a new version at its watchers, one span on the disk.

Workers wait with lease streams in two processes. Times from the commit come from a store that notes the
moment at which each new rollout was on disk; the clock is the machine's, the same in all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from agl_grpc.v1 import resources_pb2, span_pb2
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks.clients import on_loop
from benchmarks.database import grown
from benchmarks.figures import Row, figure, percentile, run
from benchmarks.ingest import Kind, stream_spans
from benchmarks.messages import (
    RUNNER,
    STORE,
    Attempt,
    Calls,
    completion,
    credit,
    plain_span,
    spec,
    stream_opening,
)
from benchmarks.servers import Server, bare_server, commits_of, folder, store_server, traced_server

PROCESSES = 2
HALF_CEILING = 200.0
"""Messages of 100 spans a second of each of two producers: half of 80,000 spans a second."""


async def wait_for_work(address: str, bare: bool, waiters: int, results: Any, ready: Any) -> None:
    """Holds `waiters` lease streams open; sends back when each rollout arrived, on `time.perf_counter`."""
    calls = Calls(address, bare)
    opened = asyncio.Semaphore(0)

    async def waiter(number: int) -> None:
        name = f"waiter-{os.getpid()}-{number}"
        stream = calls.stream(f"{RUNNER}StreamLeases")
        await stream.write(stream_opening(name, "latency"))
        opened.release()
        granted = 1
        while (answer := await stream.read()) is not grpc.aio.EOF:
            arrived = time.perf_counter()
            works = [] if bare else runner.StreamLeasesResponse.FromString(answer).delivery.rollouts
            if not (works or bare):
                continue
            results.put(arrived)
            for work in works:
                request = runner.CompleteAttemptsRequest(
                    request_id=uuid.uuid4().hex, worker_id=name, completions=[completion(work.lease)]
                )
                await calls.complete(request)
            granted += 1
            await stream.write(credit(granted))

    tasks = [asyncio.create_task(waiter(number)) for number in range(waiters)]
    for _ in tasks:
        await opened.acquire()
    ready.wait()
    await asyncio.gather(*tasks, return_exceptions=True)


async def watch(address: str, watchers: int, results: Any, ready: Any) -> None:
    """Holds `watchers` watches of resources open; sends back when each of them got each version."""
    calls = Calls(address, False)
    method = calls.channel.unary_stream(f"{STORE}WatchResources")
    opened = asyncio.Semaphore(0)
    seen: dict[int, list[float]] = {}

    async def one() -> None:
        stream = method(store.WatchResourcesRequest().SerializeToString())
        await stream.read()  # where it stands
        opened.release()
        number = 0
        while await stream.read() is not grpc.aio.EOF:
            arrived = time.perf_counter()
            number += 1
            times = seen.setdefault(number, [])
            times.append(arrived)
            if len(times) == watchers:
                results.put(seen.pop(number))

    tasks = [asyncio.create_task(one()) for _ in range(watchers)]
    for _ in tasks:
        await opened.acquire()
    ready.wait()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _never() -> None:
    """No client waits for another."""


def _run(work: Any, *arguments: Any) -> None:
    on_loop(work(*arguments))


@contextlib.contextmanager
def helpers(work: Any, address: str, *arguments: Any) -> Iterator[Any]:
    """Runs `work(address, *arguments, results, ready)` in PROCESSES processes; yields the results' queue."""
    context = multiprocessing.get_context("spawn")
    results, ready = context.Queue(), context.Barrier(PROCESSES + 1)
    processes = [
        context.Process(target=_run, args=(work, address, *arguments, results, ready), daemon=True)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    ready.wait(120)
    try:
        yield results
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def ingesting(server: Server, attempts: list[Attempt], seconds: float) -> Iterator[None]:
    """Two producers stream spans at half the ceiling meanwhile."""
    context = multiprocessing.get_context("spawn")
    kind = Kind("spans", 100, 1, HALF_CEILING)
    arguments = (stream_spans, _never, server.address, kind, attempts, seconds)
    processes = [context.Process(target=_run, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    time.sleep(1.5)  # they start up
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


async def enqueue_singly(address: str, bare: bool, count: int, results: Any) -> list[tuple[float, float]]:
    """Enqueues one rollout at a time, each after the last has arrived; when it was called for and arrived."""
    calls = Calls(address, bare)
    times = []
    for _ in range(count):
        request = store.EnqueueRolloutsRequest(request_id=uuid.uuid4().hex, rollouts=[spec("latency")])
        called = time.perf_counter()
        await calls.enqueue(request)
        times.append((called, await asyncio.to_thread(results.get, True, 30)))
        await asyncio.sleep(0.002)  # the worker's completion and credit are no part of the next
    await calls.channel.close()
    return times


async def append_singly(address: str, attempts: list[Attempt], count: int) -> list[float]:
    """Milliseconds of each of `count` calls that append one span, one after the other."""
    calls = Calls(address, False)
    times = []
    for number in range(count):
        rollout_id, attempt_id = attempts[number % len(attempts)]
        group = span_pb2.AttemptSpans(rollout_id=rollout_id, attempt_id=attempt_id, spans=[plain_span()])
        called = time.perf_counter()
        await calls.append(store.AppendSpansRequest(groups=[group]))
        times.append(1000 * (time.perf_counter() - called))
    await calls.channel.close()
    return times[count // 10 :]


async def publish(address: str, count: int, watchers: int, results: Any) -> list[float]:
    """Milliseconds from the call that publishes a version until each watcher has it."""
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(f"{STORE}PublishResources")
        found = []
        for number in range(count):
            resource = resources_pb2.Resource(name="prompt")
            resource.prompt_template.template = f"version {number}"
            request = store.PublishResourcesRequest(resources_id="prompts", resources=[resource])
            called = time.perf_counter()
            await method(request.SerializeToString())
            got = 0
            while got < watchers:
                times = await asyncio.to_thread(results.get, True, 30)
                got += len(times)
                found += [1000 * (arrived - called) for arrived in times]
    return found[2 * watchers :]


def arrivals(server: Server, bare: bool, waiters: int, count: int) -> list[tuple[float, float]]:
    """Calls and arrivals with so many workers waiting, warm."""
    with helpers(wait_for_work, server.address, bare, waiters // PROCESSES) as results:
        return list(on_loop(enqueue_singly(server.address, bare, count, results)))


def from_commit(times: list[tuple[float, float]], trace: Path) -> list[float]:
    """Milliseconds from commit to arrival; the last so many commits are those of the calls."""
    commits = commits_of(trace)[-len(times) :]
    return [1000 * (arrived - commit) for commit, (_, arrived) in zip(commits, times, strict=True)]


def _both(
    title: str, times: list[float], targets: tuple[str, str], peer: list[float] | None = None
) -> list[Row]:
    warm = times[len(times) // 10 :]
    return [
        figure(
            f"{title}, p{percent}",
            "ms",
            percentile(warm, percent),
            target,
            peer=None if peer is None else percentile(peer, percent),
        )
        for percent, target in zip((50, 99), targets, strict=True)
    ]


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    rows: list[Row] = []
    count = options.count
    with bare_server() as server:
        bare = [1000 * (arrived - called) for called, arrived in arrivals(server, True, 128, count)]
    with folder() as place:
        attempts = grown(place / "store.db", 0)
        with traced_server(place / "store.db") as (server, trace):
            times = arrivals(server, False, 128, count)
        from_call = [1000 * (arrived - called) for called, arrived in times]
        rows += _both("enqueue call to receipt, 128 waiting", from_call, ("<= 3", "<= 15"), bare)
        with traced_server(place / "store.db") as (server, trace):
            times = arrivals(server, False, 512, count)
        rows += _both("commit to receipt, 512 waiting", from_commit(times, trace), ("<= 1", "<= 5"))
        with traced_server(place / "store.db") as (server, trace):
            seconds = 4.0 + count * 0.05
            with ingesting(server, attempts, seconds):
                times = arrivals(server, False, 512, count)
        title = "commit to receipt, 512 waiting, 40,000 spans/s coming in"
        rows += _both(title, from_commit(times, trace), ("", "<= 20"))
        with store_server(place / "store.db") as server:
            rows += _both(
                "one span appended, on disk",
                on_loop(append_singly(server.address, attempts, 2 * count)),
                ("", "<= 5"),
            )
            with helpers(watch, server.address, options.watchers // PROCESSES) as results:
                found = on_loop(publish(server.address, 12, options.watchers, results))
        rows += _both(f"new version at {options.watchers:,} watchers", found, ("", "<= 50"))
    return rows


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            count=(300, "rollouts in each latency measurement"),
            watchers=(1000, "watchers of resources"),
        )
    )
