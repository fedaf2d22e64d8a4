"""Rollouts through their whole life, and how soon waiting workers get new ones: a real store on disk.

A life is enqueue → lease → span → complete, each durable before its answer. Four client processes; the peer
is gRPC alone with the same calls and the same clients, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agl_grpc.v1 import attempt_pb2, common_pb2, rollout_pb2, span_pb2
from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store

ROOT = Path(__file__).parent.parent
CLIENTS = 4
LOOPS = 8
"""Lives under way at once in each client process, one call a step."""
BATCH = 50
WAIT = Duration(seconds=5)
WAITERS = 128

Unary = Callable[[Any], Awaitable[Any]]


class Calls:
    """The methods of a life, on one channel. The peer gets the same bytes and its answers are not read."""

    def __init__(self, address: str, bare: bool) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.bare = bare
        service = "/agl_grpc.v1.StoreService/"
        self.enqueue = self._unary(service + "EnqueueRollouts", store.EnqueueRolloutsResponse)
        self.append = self._unary(service + "AppendSpans", store.AppendSpansResponse)
        service = "/agl_grpc.v1.RunnerService/"
        self.lease = self._unary(service + "LeaseRollouts", runner.LeaseRolloutsResponse)
        self.complete = self._unary(service + "CompleteAttempts", runner.CompleteAttemptsResponse)

    def _unary(self, method: str, answer: Any) -> Unary:
        call: Unary = self.channel.unary_unary(
            method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=None if self.bare else answer.FromString,
        )
        return call


def spec(queue: str, data: bytes = b'{"question":"12 + 30"}') -> rollout_pb2.RolloutSpec:
    """A small task."""
    return rollout_pb2.RolloutSpec(
        input=common_pb2.Payload(media_type="application/json", data=data), queue=queue
    )


def span() -> span_pb2.Span:
    """About 700 bytes, a random id."""
    now = time.time_ns()
    attributes = [
        common_pb2.KeyValue(key=f"attribute.{i}", value=common_pb2.AnyValue(string_value="x" * 45))
        for i in range(9)
    ]
    return span_pb2.Span(
        trace_id=os.urandom(16),
        span_id=os.urandom(8),
        name="step",
        start_time_unix_nano=now,
        end_time_unix_nano=now,
        attributes=attributes,
    )


async def live(calls: Calls, queue: str, batch: int) -> None:
    """Takes `batch` rollouts through their life, one call a step."""
    identity = uuid.uuid4().hex
    await calls.enqueue(store.EnqueueRolloutsRequest(request_id=identity, rollouts=[spec(queue)] * batch))
    work = runner.WorkRequest(queues=[queue])
    request = runner.LeaseRolloutsRequest(
        request_id=identity,
        worker_id=queue,
        session_id=queue,
        work=work,
        limit=batch,
        wait=Duration(seconds=5),
    )
    answer = await calls.lease(request)
    leases = [held.lease for held in answer.rollouts] if not calls.bare else [bare_lease()] * batch
    assert len(leases) == batch, f"leased {len(leases)} of {batch}"
    groups = [
        span_pb2.AttemptSpans(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, spans=[span()])
        for lease in leases
    ]
    stored = await calls.append(store.AppendSpansRequest(groups=groups))
    completions = [
        runner.Completion(
            rollout_id=lease.rollout_id,
            attempt_id=lease.attempt_id,
            lease_token=lease.lease_token,
            status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED,
        )
        for lease in leases
    ]
    done = await calls.complete(
        runner.CompleteAttemptsRequest(request_id=identity, worker_id=queue, completions=completions)
    )
    if not calls.bare:
        assert stored.stored == batch, stored
        assert not any(result.HasField("error") for result in done.results), done


@functools.cache
def bare_lease() -> attempt_pb2.Lease:
    """What the peer's clients put where the store's would put a lease."""
    return attempt_pb2.Lease(rollout_id="ro-" + "0" * 24, attempt_id="at-" + "0" * 24, lease_token=b"0" * 32)


async def live_for(address: str, bare: bool, batch: int, loops: int, seconds: float, start: Any) -> float:
    """Lives a second of one client process."""
    calls = Calls(address, bare)
    queues = [f"q-{os.getpid()}-{i}" for i in range(loops)]
    # Connected, and every code path warm, before the clock runs.
    await asyncio.gather(*(live(calls, queue, batch) for queue in queues))
    await asyncio.to_thread(start.wait)
    began = time.perf_counter()
    count = 0

    async def loop(queue: str) -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            await live(calls, queue, batch)
            count += batch

    await asyncio.gather(*(loop(queue) for queue in queues))
    elapsed = time.perf_counter() - began
    await calls.channel.close()
    return count / elapsed


async def wait_for_work(address: str, bare: bool, waiters: int, results: Any, start: Any) -> None:
    """Holds `waiters` lease streams open; sends back how long each rollout took to arrive, in seconds."""
    calls = Calls(address, bare)
    opened = asyncio.Semaphore(0)

    async def waiter(number: int) -> None:
        name = f"waiter-{os.getpid()}-{number}"
        stream = calls.channel.stream_stream("/agl_grpc.v1.RunnerService/StreamLeases")()
        opening = runner.LeaseStreamOpen(
            worker_id=name, session_id=name, work=runner.WorkRequest(queues=["latency"]), granted=1
        )
        await stream.write(runner.StreamLeasesRequest(open=opening).SerializeToString())
        granted = 1
        opened.release()
        while True:
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                return
            arrived = time.perf_counter()
            works = [] if bare else runner.StreamLeasesResponse.FromString(answer).delivery.rollouts
            inputs = [work.rollout.input.data for work in works]
            if bare:
                inputs = [store.EnqueueRolloutsRequest.FromString(answer).rollouts[0].input.data]
            for work in works:
                await calls.complete(_completion(name, work))
            for data in inputs:
                results.put(arrived - float(data))
                granted += 1
                credit = runner.CreditGrant(granted=granted)
                await stream.write(runner.StreamLeasesRequest(credit=credit).SerializeToString())

    tasks = [asyncio.create_task(waiter(number)) for number in range(waiters)]
    for _ in tasks:
        await opened.acquire()
    start.wait()
    await asyncio.gather(*tasks, return_exceptions=True)


def _completion(worker_id: str, work: runner.LeasedRollout) -> runner.CompleteAttemptsRequest:
    completion = runner.Completion(
        rollout_id=work.lease.rollout_id,
        attempt_id=work.lease.attempt_id,
        lease_token=work.lease.lease_token,
        status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED,
    )
    return runner.CompleteAttemptsRequest(
        request_id=uuid.uuid4().hex, worker_id=worker_id, completions=[completion]
    )


async def enqueue_singly(address: str, bare: bool, count: int, results: Any) -> list[float]:
    """Enqueues one rollout at a time, each after the last has arrived; how long each took to arrive."""
    calls = Calls(address, bare)
    latencies = []
    for _ in range(count):
        data = str(time.perf_counter()).encode()
        await calls.enqueue(
            store.EnqueueRolloutsRequest(request_id=uuid.uuid4().hex, rollouts=[spec("latency", data)])
        )
        latencies.append(await asyncio.to_thread(results.get, True, 30))
    await calls.channel.close()
    return latencies


def on_loop(work: Any) -> Any:
    """Runs a coroutine on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        return loop.run(work)


def _life_process(results: Any, *arguments: Any) -> None:
    results.put(on_loop(live_for(*arguments)))


def _waiter_process(*arguments: Any) -> None:
    on_loop(wait_for_work(*arguments))


def lives_per_second(address: str, bare: bool, batch: int, loops: int, seconds: float) -> float:
    """All client processes together."""
    context = multiprocessing.get_context("spawn")
    results, start = context.Queue(), context.Barrier(CLIENTS)
    arguments = (results, address, bare, batch, loops, seconds, start)
    processes = [context.Process(target=_life_process, args=arguments) for _ in range(CLIENTS)]
    for process in processes:
        process.start()
    rate = sum(results.get(timeout=seconds + 120) for _ in processes)
    for process in processes:
        process.join()
    return rate


def arrival_latencies(address: str, bare: bool, count: int) -> list[float]:
    """Milliseconds from the enqueue call to receipt, with all waiters spread over two processes."""
    context = multiprocessing.get_context("spawn")
    results, start = context.Queue(), context.Barrier(3)
    arguments = (address, bare, WAITERS // 2, results, start)
    processes = [context.Process(target=_waiter_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    start.wait()
    try:
        latencies = on_loop(enqueue_singly(address, bare, count + count // 10, results))
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [1000 * seconds for seconds in latencies[count // 10 :]]


@contextlib.contextmanager
def store_server(database: str | None = None) -> Iterator[str]:
    """A store on a disk of this machine or on a PostgreSQL database; its address."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, socket_port() as port:
        command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", str(port)]
        command += ["--database", database or f"{folder}/store.db", "--log-level", "warning"]
        process = subprocess.Popen(command)
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            health.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
        try:
            yield address
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def socket_port() -> Iterator[int]:
    """A free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    yield port


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    """The peer's address."""
    command = [sys.executable, "-m", "benchmarks.bare_peer"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many per cent do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(seconds: float, arrivals: int, database: str | None) -> list[dict[str, Any]]:
    """All figures, those of the peer beside them."""
    raw: list[dict[str, float]] = []
    for bare, server in ((False, functools.partial(store_server, database)), (True, bare_server)):
        with server() as address:
            single = lives_per_second(address, bare, 1, LOOPS, seconds)
            batched = lives_per_second(address, bare, BATCH, 2, seconds)
            latencies = arrival_latencies(address, bare, arrivals)
        p50, p99 = percentile(latencies, 50), percentile(latencies, 99)
        raw.append({"single": single, "batched": batched, "p50": p50, "p99": p99})
    ours, peer = raw
    rows = (
        ("single", "rollout lives, one call a step, 4 client processes", "lives/s", ">= 800"),
        ("batched", f"rollout lives, {BATCH} a call, 4 client processes", "lives/s", ">= 1500"),
        ("p50", f"enqueue call to receipt, {WAITERS} waiting, p50", "ms", "<= 3"),
        ("p99", f"enqueue call to receipt, {WAITERS} waiting, p99", "ms", "<= 15"),
    )
    return [
        {
            "name": name,
            "unit": unit,
            "value": ours[key],
            "target": target,
            "peer": peer[key],
            "peer_name": "bare gRPC",
        }
        for key, name, unit, target in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(prog="bench_lifecycle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each throughput measurement")
    parser.add_argument("--arrivals", type=int, default=500, help="rollouts in each latency measurement")
    parser.add_argument("--database", help="URL of an empty PostgreSQL database; default: an SQLite file")
    options = parser.parse_args(argv)
    print(json.dumps({"figures": measure(options.seconds, options.arrivals, options.database)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
