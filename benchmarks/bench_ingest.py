"""Durable span ingest through StreamSpans, beside the bare transport and the bare database.

    python -m benchmarks.bench_ingest [--seconds 10] [--clients 2]

Starts a real `agl-grpc store serve` on a fresh database, makes 512 attempts, and lets client processes
stream messages of one attempt each with random span ids. Peers, measured in the same run: a gRPC server
that acknowledges the same messages without looking at them, and SQLite alone with the same rows, index
and durability. The last line printed is one JSON object, as `python -m benchmarks` wants it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import uvloop

from agl_grpc.model import raw
from agl_grpc.v1 import rollout_pb2, span_pb2, store_service_pb2, store_service_pb2_grpc

ATTEMPTS = 512
SPAN_BYTES = 700
PROMPT, RESPONSE = 1024, 256
WINDOW = 32  # unacknowledged messages of one client
_METHOD = "/agl_grpc.v1.StoreService/StreamSpans"
_ID_MARK = b"\x12\x08"  # field 2 (span_id), 8 bytes


def plain_span(number: int) -> span_pb2.Span:
    """A span of SPAN_BYTES bytes with a handful of attributes."""
    now = time.time_ns()
    span = span_pb2.Span(
        trace_id=os.urandom(16),
        span_id=b"\0" * 8,
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
    span = span_pb2.Span(span_id=b"\0" * 8, name="chat.completions", start_time_unix_nano=time.time_ns())
    call = span.model_call
    call.model = "bench"
    call.prompt.token_ids.extend(chance.randrange(150_000) for _ in range(PROMPT))
    choice = call.choices.add(finish_reason="stop")
    choice.token_ids.extend(chance.randrange(150_000) for _ in range(RESPONSE))
    choice.logprobs.extend(-chance.random() for _ in range(RESPONSE))
    choice.policy_runs.add(start=0, end=RESPONSE, policy_version=3)
    return span


class Messages:
    """Serialised stream messages with fresh random span ids."""

    def __init__(self, kind: str, per_message: int, attempts: list[tuple[str, str]]) -> None:
        make = call_span if kind == "calls" else plain_span
        self._spans = [make(number).SerializeToString() for number in range(per_message)]
        self._places = [span.index(_ID_MARK) + 2 for span in self._spans]
        self._attempts = attempts
        self.bytes_per_span = sum(map(len, self._spans)) / per_message

    def make(self, sequence: int) -> bytes:
        """The message with this number."""
        rollout_id, attempt_id = random.choice(self._attempts)
        ids = os.urandom(8 * len(self._spans))
        request = raw.RawStreamSpansRequest()
        request.spans.sequence = sequence
        request.spans.groups.add(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            spans=[
                span[:place] + ids[8 * index : 8 * index + 8] + span[place + 8 :]
                for index, (span, place) in enumerate(zip(self._spans, self._places, strict=True))
            ],
        )
        data: bytes = request.SerializeToString()
        return data


async def stream(address: str, producer: str, messages: Messages, seconds: float) -> tuple[int, float]:
    """Stream for so long; acknowledged messages and the time until the last acknowledgement."""
    parse = store_service_pb2.StreamSpansResponse.FromString
    async with grpc.aio.insecure_channel(address) as channel:
        # Any: the stubs of grpc cannot know that requests are bytes already.
        call: Any = channel.stream_stream(_METHOD, response_deserializer=parse)(wait_for_ready=True)
        opening = store_service_pb2.SpanStreamOpen(producer_id=producer)
        await call.write(store_service_pb2.StreamSpansRequest(open=opening).SerializeToString())
        await call.read()
        acked, sent, room = 0, 0, asyncio.Event()

        async def read() -> None:
            nonlocal acked
            while (answer := await call.read()) is not grpc.aio.EOF:
                if answer.ack.rejected:
                    raise SystemExit(f"rejected: {answer.ack.rejected[0]}")
                acked = answer.ack.sequence
                room.set()

        reading = asyncio.create_task(read())
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            sent += 1
            await call.write(messages.make(sent))
            while sent - acked >= WINDOW:
                room.clear()
                await room.wait()
        await call.done_writing()
        await reading
        return acked, time.perf_counter() - begin


def client(arguments: argparse.Namespace) -> None:
    """One client process: begins when its standard input says so, prints what it did."""
    attempts = [tuple(pair) for pair in json.loads(Path(arguments.attempts).read_text())]
    messages = Messages(arguments.kind, arguments.per_message, attempts)
    print("ready", flush=True)
    sys.stdin.readline()
    acked, seconds = uvloop.run(stream(arguments.address, f"c{os.getpid()}", messages, arguments.seconds))
    print(json.dumps({"messages": acked, "seconds": seconds, "cpu": time.process_time()}), flush=True)


def run_clients(
    address: str, folder: Path, kind: str, per_message: int, count: int, seconds: float, pid: int
) -> dict[str, float]:
    """Several client processes at once; rates in spans."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_ingest",
        "--address",
        address,
        "--kind",
        kind,
        "--seconds",
        str(seconds),
    ]
    command += ["--per-message", str(per_message), "--attempts", str(folder / "attempts.json")]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    before = cpu_of(pid)
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=seconds * 4 + 30)
        outputs.append(json.loads(output))
    longest = max(one["seconds"] for one in outputs)
    spans = sum(one["messages"] for one in outputs) * per_message
    return {
        "spans_per_second": round(spans / longest),
        "spans": spans,
        "seconds": round(longest, 2),
        "server_cpu_us_per_span": round((cpu_of(pid) - before) / spans * 1e6, 2),
        "client_cpu_us_per_span": round(sum(one["cpu"] for one in outputs) / spans * 1e6, 2),
    }


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def store_server(database: Path | str) -> Iterator[tuple[str, int]]:
    """A real server process: its address and process id."""
    port = free_port()
    command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", str(port)]
    process = subprocess.Popen([*command, "--database", str(database), "--log-level", "warning"])
    try:
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def bare_server() -> Iterator[tuple[str, int]]:
    """The peer that acknowledges without looking: what the transport alone costs."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.bench_ingest", "--bare", str(port)])
    try:
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


async def serve_bare(port: int) -> None:
    """Answers each message with an acknowledgement of its number."""

    async def handle(_requests: object, context: Any) -> None:
        response = store_service_pb2.StreamSpansResponse
        opened = response(opened=store_service_pb2.SpanStreamOpened(epoch=1)).SerializeToString()
        number = 0
        while (data := await context.read()) is not grpc.aio.EOF:
            ack = store_service_pb2.SpanStreamAck(sequence=number)
            await context.write(response(ack=ack).SerializeToString() if number else opened)
            number += 1 if data else 0

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    methods: dict[str, Any] = {"StreamSpans": grpc.stream_stream_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("agl_grpc.v1.StoreService", methods),)
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def make_attempts(address: str) -> list[tuple[str, str]]:
    """Attempts to write to: (rollout, attempt)."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        request = store_service_pb2.StartRolloutRequest(rollout=rollout_pb2.RolloutSpec())
        made = []
        for _ in range(ATTEMPTS):
            answer = await stub.StartRollout(request, wait_for_ready=True, timeout=30)
            made.append((answer.rollout.rollout.rollout_id, answer.rollout.attempt.attempt_id))
        return made


def bare_database(folder: Path, seconds: float) -> dict[str, float]:
    """SQLite alone: the same rows, unique index and durability, 1000 rows a transaction, one thread."""
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 8000"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(
        "CREATE TABLE spans (span_key INTEGER PRIMARY KEY, attempt INTEGER, span_ref INTEGER, "
        "sequence INTEGER, received INTEGER, flags INTEGER, prompt INTEGER, data BLOB)"
    )
    connection.execute("CREATE UNIQUE INDEX natural ON spans (attempt, span_ref)")
    data, count, begin = os.urandom(SPAN_BYTES), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(10):
            attempt = random.randrange(ATTEMPTS)
            rows = [(attempt, random.getrandbits(62), count + n, 1, 0, 0, data) for n in range(100)]
            connection.executemany("INSERT INTO spans VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
            count += 100
        connection.execute("COMMIT")
    took = time.perf_counter() - begin
    connection.close()
    return {"spans_per_second": round(count / took), "seconds": round(took, 2)}


def figure(name: str, store: dict[str, float], bare: dict[str, float], target: int) -> dict[str, Any]:
    """One row of the result: the store beside the bare transport."""
    return {
        "name": name,
        "unit": "/s",
        "value": store["spans_per_second"],
        "target": target,
        "peer": bare["spans_per_second"],
        "peer_name": "gRPC alone, nothing parsed or stored",
        "store": store,
        "bare": bare,
    }


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    rows = []
    kinds = (
        ("spans", arguments.spans_per_message, "durable 700-byte spans through StreamSpans", 60_000),
        ("calls", arguments.calls_per_message, "durable 1,280-token model calls through StreamSpans", 8_000),
    )
    with tempfile.TemporaryDirectory(prefix="agl-grpc-bench-") as name:
        folder = Path(name)
        for kind, per_message, title, target in kinds:
            given = (kind, per_message, arguments.clients, arguments.seconds)
            with store_server(arguments.database or folder / f"{kind}.db") as (address, pid):
                attempts = asyncio.run(make_attempts(address))
                (folder / "attempts.json").write_text(json.dumps(attempts))
                store = run_clients(address, folder, *given, pid)
            with bare_server() as (address, pid):
                bare = run_clients(address, folder, *given, pid)
            rows.append(figure(f"{title}, {per_message} a message", store, bare, target))
        database = bare_database(folder, arguments.seconds / 2)
    load = {"name": "load average when done", "unit": "", "value": round(os.getloadavg()[0], 2)}
    alone = {"name": "700-byte rows, SQLite alone", "unit": "/s", "value": database["spans_per_second"]}
    return {"figures": [*rows, alone, load]}


def main() -> None:
    """Read the command line and print the result, or play a part of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each part runs")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--database", help="URL of an empty PostgreSQL database; default: an SQLite file")
    parser.add_argument("--spans-per-message", type=int, default=100)
    parser.add_argument("--calls-per-message", type=int, default=16)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--per-message", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--attempts", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        uvloop.run(serve_bare(arguments.bare))
    elif arguments.address:
        client(arguments)
    else:
        print(json.dumps(bench(arguments)))


if __name__ == "__main__":
    main()
