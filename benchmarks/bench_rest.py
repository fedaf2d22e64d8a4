"""REST and OTLP against Agent Lightning 0.3.0's own server, which keeps all in memory; ours is durable.

Raw requests are replayed over 64 connections (what a server can do), over one (what a caller waits for), and
sent by Agent Lightning's own client, 32 lives at once. Batches of OpenTelemetry's exporter go in by
OTLP/gRPC. The peer's environment is made by `make peers`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from benchmarks.clients import Start, run_clients
from benchmarks.figures import Row, figure, percentile, run
from benchmarks.raw_http import post, replay
from benchmarks.servers import ROOT, Server, folder, store_server

PEER = "agentlightning 0.3.0, in memory"
API = "/v1/agl"
CONNECTIONS = 64
CLIENT_LIVES = 32
BATCH = 512
"""Spans of one batch of OpenTelemetry's exporters."""

_PYTHON = ROOT / ".venv-agentlightning/bin/python"
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_START_SECONDS = 60.0
_MARK = b"\x12\x08"
_ATTEMPTS = 64


def call(url: str, body: Any = None) -> Any:
    """One request, as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def peer_server() -> Iterator[Server]:
    """Agent Lightning's own server."""
    port = _free_port()
    command = [str(_PYTHON.with_name("agl")), "store", "--host", "127.0.0.1", "--port", str(port)]
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(
            [*command, "--log-level", "ERROR"], stdout=nowhere, stderr=nowhere, text=True
        )
    try:
        _wait_until_healthy(port, process)
        yield Server(f"127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait()


def _wait_until_healthy(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            call(f"http://127.0.0.1:{port}{API}/health")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the peer did not start: run `make peers`")
        time.sleep(0.05)


def attempts_of(port: int) -> list[tuple[str, str]]:
    """Live attempts to write to."""
    made = [call(f"http://127.0.0.1:{port}{API}/rollouts", {"input": 1}) for _ in range(_ATTEMPTS)]
    return [(one["rollout_id"], one["attempt"]["attempt_id"]) for one in made]


def span_requests(attempts: list[tuple[str, str]], seed: int, connection: int) -> Iterator[bytes]:
    """Spans with eight attributes of 100 characters, each with an id of its own."""
    rollout_id, attempt_id = attempts[connection % len(attempts)]
    chance = random.Random(f"{seed}-{connection}")
    for number in itertools.count(1):
        span_id = f"{chance.getrandbits(64):016x}"
        body = {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": number,
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "span_id": span_id,
            "parent_id": None,
            "name": "step",
            "status": {"status_code": "OK", "description": None},
            "attributes": {f"attribute.{i}": "x" * 100 for i in range(8)},
            "events": [],
            "links": [],
            "start_time": 1700000000.5,
            "end_time": 1700000001.5,
            "context": None,
            "parent": None,
            "resource": {"attributes": {}, "schema_url": ""},
        }
        yield post(f"{API}/spans", json.dumps(body).encode())


def rollout_requests(_attempts: list[tuple[str, str]], _seed: int, _connection: int) -> Iterator[bytes]:
    """Rollouts that are started."""
    body = json.dumps({"input": {"question": "12 + 30"}, "mode": "train", "metadata": {"n": 1}}).encode()
    return itertools.repeat(post(f"{API}/rollouts", body))


def dequeue_requests(_attempts: list[tuple[str, str]], _seed: int, connection: int) -> Iterator[bytes]:
    """Workers that find their queue empty."""
    body = json.dumps({"limit": 1, "worker_id": f"Worker-{connection}"}).encode()
    return itertools.repeat(post(f"{API}/queues/rollouts/dequeue", body))


KINDS = {
    "spans stored": span_requests,
    "rollouts started": rollout_requests,
    "empty dequeues": dequeue_requests,
}


def measured(server: Server, port: int, kind: Any, connections: int, seconds: float) -> tuple[float, float]:
    """Requests a second, and the median latency in milliseconds."""
    attempts = attempts_of(port)
    requests = partial(kind, attempts, random.getrandbits(32))
    outcome = run_clients(server, 1, replay, "127.0.0.1", port, requests, connections, seconds)
    ((latencies, took),) = outcome.results
    return len(latencies) / took, 1000 * percentile(latencies, 50)


def lives(port: int, seconds: float) -> float:
    """Lives a second of Agent Lightning's own client."""
    command = [str(_PYTHON), "-W", "ignore", str(ROOT / "benchmarks/peer_flow.py")]
    command += [f"http://127.0.0.1:{port}", str(CLIENT_LIVES), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return float(done.stdout.strip().splitlines()[-1])


def batch_of(attempt: tuple[str, str]) -> bytes:
    """A batch as OpenTelemetry's exporter sends it; its span ids are put in later."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    names = ("agentlightning.rollout_id", "agentlightning.attempt_id", "service.name")
    for name, value in zip(names, (*attempt, "agent"), strict=True):
        of_resource.resource.attributes.add(key=name).value.string_value = value
    scope = of_resource.scope_spans.add()
    scope.scope.name = "bench"
    for _ in range(BATCH):
        span = scope.spans.add(trace_id=b"t" * 16, span_id=b"#" * 8, name="openai.chat.completion")
        span.start_time_unix_nano, span.end_time_unix_nano = 1_700_000_000 * 10**9, 1_700_000_001 * 10**9
        for number in range(6):
            span.attributes.add(key=f"gen_ai.attribute.{number}").value.string_value = "x" * 40
        span.attributes.add(key="gen_ai.usage.output_tokens").value.int_value = 12
    return request.SerializeToString()


async def export(
    start: Start, address: str, attempts: list[tuple[str, str]], seconds: float
) -> tuple[int, float]:
    """Four exports in flight, as long as it takes; spans and seconds."""

    pieces = [batch_of(attempt).split(_MARK + b"#" * 8) for attempt in attempts]
    channel = grpc.aio.insecure_channel(address)
    send: Any = channel.unary_unary(_EXPORT)
    await start()
    begun, count = time.perf_counter(), 0

    async def exporter(number: int) -> None:
        nonlocal count
        turn = itertools.cycle(pieces[number::4])
        while time.perf_counter() - begun < seconds:
            ids = os.urandom(8 * BATCH)
            parts = next(turn)
            marks = (_MARK + ids[8 * i : 8 * i + 8] + part for i, part in enumerate(parts[1:]))
            assert await send(parts[0] + b"".join(marks)) == b""
            count += BATCH

    await asyncio.gather(*(exporter(number) for number in range(4)))
    took = time.perf_counter() - begun
    await channel.close()
    return count, took


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    rows: list[Row] = []
    with folder() as place, contextlib.ExitStack() as stack:
        port = _free_port()
        ours = stack.enter_context(store_server(place / "store.db", extra=("--http-port", str(port))))
        theirs = stack.enter_context(peer_server())
        peer_port = int(theirs.address.rpartition(":")[2])
        for name, kind in KINDS.items():
            for connections in (CONNECTIONS, 1):
                peer = measured(theirs, peer_port, kind, connections, options.seconds)
                found = measured(ours, port, kind, connections, options.seconds)
                rows.append(_row(name, connections, found, peer))
        peer_lives, our_lives = lives(peer_port, options.seconds), lives(port, options.seconds)
        title = f"lives of its own client, {CLIENT_LIVES} at once"
        rows.append(figure(title, "/s", our_lives, ">= 2x", peer=peer_lives, peer_name=PEER))
        attempts = attempts_of(port)
        outcome = run_clients(ours, 1, export, ours.address, attempts, options.seconds)
        spans, took = outcome.results[0]
        rows.append(
            figure(
                f"OTLP/gRPC spans, durable, {BATCH} a batch",
                "/s",
                spans / took,
                ">= 25000",
                server_cpu_us=1e6 * outcome.server_cpu / spans,
            )
        )
    return rows


def _row(name: str, connections: int, found: tuple[float, float], peer: tuple[float, float]) -> Row:
    """Capacity with many connections, latency with one."""
    if connections > 1:
        title = f"{name}, {connections} connections"
        return figure(title, "/s", found[0], ">= 5x", peer=peer[0], peer_name=PEER)
    title = f"{name}, one at a time, median"
    return figure(title, "ms", found[1], "<= 1x", peer=peer[1], peer_name=PEER)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, seconds=(3.0, "how long each kind is sent")))
