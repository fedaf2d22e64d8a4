"""A rollout's life as clients drive it: enqueue, lease, span, complete, each durable before its answer."""

from __future__ import annotations

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc

from agl_grpc.model import raw
from agl_grpc.v1 import attempt_pb2, span_pb2
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks.clients import Start, run_clients
from benchmarks.messages import (
    RUNNER,
    STORE,
    Calls,
    SpanStream,
    completion,
    credit,
    lease_request,
    plain_span,
    spec,
    stream_opening,
)
from benchmarks.servers import Server

CLIENTS = 4
LOOPS = 8
"""Lives under way at once in each client process, one call a step."""

Live = Callable[[str], Awaitable[None]]


class Rate(NamedTuple):
    """Lives a second, and microseconds of CPU for each."""

    lives: float
    server_cpu: float
    client_cpu: float


async def live_by_calls(calls: Calls, batch: int, queue: str) -> None:
    """Takes `batch` rollouts through their life, one call a step."""
    identity = uuid.uuid4().hex
    await calls.enqueue(store.EnqueueRolloutsRequest(request_id=identity, rollouts=[spec(queue)] * batch))
    answer = await calls.lease(lease_request(queue, identity, batch))
    leases = [_bare_lease()] * batch if calls.bare else [held.lease for held in answer.rollouts]
    assert len(leases) == batch, f"leased {len(leases)} of {batch}"
    groups = [
        span_pb2.AttemptSpans(rollout_id=one.rollout_id, attempt_id=one.attempt_id, spans=[plain_span()])
        for one in leases
    ]
    stored = await calls.append(store.AppendSpansRequest(groups=groups))
    await _complete(calls, identity, queue, leases)
    assert calls.bare or stored.stored == batch, stored


async def _complete(calls: Calls, identity: str, worker: str, leases: list[attempt_pb2.Lease]) -> None:
    completions = [completion(lease) for lease in leases]
    request = runner.CompleteAttemptsRequest(request_id=identity, worker_id=worker, completions=completions)
    done = await calls.complete(request)
    assert calls.bare or not any(result.HasField("error") for result in done.results), done


@functools.cache
def _bare_lease() -> attempt_pb2.Lease:
    """What the peer's clients put where the store's would put a lease."""
    return attempt_pb2.Lease(rollout_id="ro-" + "0" * 24, attempt_id="at-" + "0" * 24, lease_token=b"0" * 32)


class Worker:
    """One worker as the runner is one: work is pushed to it, spans go out on a stream, the rest are calls."""

    def __init__(self, calls: Calls, spans: _SharedSpans) -> None:
        self._calls = calls
        self._spans = spans
        self._leases: Any = None
        self._granted = 1

    async def live(self, queue: str) -> None:
        """Takes a rollout through its life."""
        if self._leases is None:
            self._leases = self._calls.stream(f"{RUNNER}StreamLeases")
            await self._leases.write(stream_opening(queue, queue))
            await self._leases.read()
        identity = uuid.uuid4().hex
        request = store.EnqueueRolloutsRequest(request_id=identity, rollouts=[spec(queue)])
        await self._calls.enqueue(request)
        lease = (await self._delivery()).lease
        await self._spans.send(lease)
        await _complete(self._calls, identity, queue, [lease])
        self._granted += 1
        await self._leases.write(credit(self._granted))

    async def _delivery(self) -> runner.LeasedRollout:
        while (data := await self._leases.read()) is not grpc.aio.EOF:
            answer = runner.StreamLeasesResponse.FromString(data)
            if answer.HasField("delivery"):
                return answer.delivery.rollouts[0]
        raise RuntimeError("the lease stream has ended")


class _SharedSpans:
    """The span stream of a process; each sender waits until its own message is on disk."""

    def __init__(self, calls: Calls) -> None:
        self._stream = SpanStream(calls.stream(f"{STORE}StreamSpans"))
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._turn = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    async def send(self, lease: attempt_pb2.Lease) -> None:
        """Sends one span of an attempt."""
        async with self._turn:
            if self._reading is None:
                await self._stream.open(f"bench-{os.getpid()}")
                self._reading = asyncio.create_task(self._read())
            number = self._stream.sent + 1
            request = raw.RawStreamSpansRequest()
            request.spans.sequence = number
            request.spans.groups.add(
                rollout_id=lease.rollout_id,
                attempt_id=lease.attempt_id,
                spans=[plain_span().SerializeToString()],
            )
            stored = self._waiting[number] = asyncio.get_running_loop().create_future()
            await self._stream.send(request.SerializeToString())
        await stored

    async def _read(self) -> None:
        while await self._stream.read():
            for number in [number for number in self._waiting if number <= self._stream.acked]:
                self._waiting.pop(number).set_result(None)


async def live_for(
    start: Start, address: str, bare: bool, batch: int, loops: int, seconds: float, rate: float = 0.0
) -> float:
    """Lives a second of one client process; a batch of 0 = as workers with streams do it.

    `rate` is how many begin each second at most; 0 = each as soon as the one before is over.
    """
    calls = Calls(address, bare)
    spans = _SharedSpans(calls)
    queues = [f"q-{os.getpid()}-{number}" for number in range(loops)]
    lives: list[Live] = [
        functools.partial(live_by_calls, calls, batch) if batch else Worker(calls, spans).live for _ in queues
    ]
    # Connected, and every code path warm, before the clock runs.
    await asyncio.gather(*(live(queue) for live, queue in zip(lives, queues, strict=True)))
    await start()
    begun, count = time.perf_counter(), 0

    async def loop(live: Live, queue: str, turn: int) -> None:
        nonlocal count
        while (now := time.perf_counter() - begun) < seconds:
            if rate and (early := turn / rate - now) > 0:
                await asyncio.sleep(early)
            await live(queue)
            count += batch or 1
            turn += loops * (batch or 1)

    pairs = zip(lives, queues, strict=True)
    await asyncio.gather(*(loop(live, queue, turn) for turn, (live, queue) in enumerate(pairs)))
    took = time.perf_counter() - begun
    await calls.channel.close()
    return count / took


def rate_of(
    server: Server, bare: bool, batch: int, seconds: float, *, clients: int = CLIENTS, loops: int = LOOPS
) -> Rate:
    """All client processes together."""
    found = run_clients(server, clients, live_for, server.address, bare, batch, loops, seconds)
    rate = sum(found.results)
    lives = rate * found.seconds
    return Rate(rate, 1e6 * found.server_cpu / lives, 1e6 * found.client_cpu / lives)
