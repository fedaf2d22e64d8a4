"""What the proxy in front of an engine costs, against the bare engine in the same run.

The engine answers after a fixed time and costs next to nothing (`fixed_engine`), the client only waits
(`http_load`), the store is a real one on disk; all of it shares this machine. Blocks of requests through the
proxy and to the bare engine alternate; what is captured has to be in the store at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import orjson
import psutil
import uvloop

from agl_grpc.v1 import store_service_pb2, store_service_pb2_grpc
from benchmarks import processor
from benchmarks.figures import Row, figure, percentile, run
from benchmarks.http_load import Connection, Timing
from tests.support.store_process import StoreProcess

BARE = "the bare engine"
ATTEMPTS = 32
WAIT_MS = 50
RECORD_BYTES = 24 * 1024
PARTS = "parts.json"
PAUSE = 0.02
"""Seconds that a client rests at most between two requests, where requests come one by one."""


class Rig(NamedTuple):
    """What runs: where the engine and the proxy are, whose the calls are, the proxy's process, its folder."""

    engine: int
    proxy: int
    bases: list[str]
    process: psutil.Process
    folder: Path

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.proxy}/agl/interceptor").json()
        return found

    def cpu(self) -> float:
        """Of all its processes."""
        return processor.seconds_of_all(self.process)

    def parts(self) -> dict[str, float]:
        """Seconds of a profiled proxy's processor that each of its parts has used."""
        target = self.folder / PARTS
        self.process.send_signal(signal.SIGUSR2)
        until = time.monotonic() + 30
        # The proxy has no other way to tell: its gRPC and HTTP are what is measured.
        while not target.exists():
            assert time.monotonic() < until, "the profiled proxy does not tell where its time goes"
            time.sleep(0.01)
        found: dict[str, float] = json.loads(target.read_text())
        target.unlink()
        return found

    def sync(self) -> float:
        """Milliseconds, in the median, until a record's bytes are on the disk of the proxy's spool."""
        taken = []
        data = bytes(RECORD_BYTES)
        with (self.folder / "synced").open("wb", buffering=0) as file:
            for number in range(200):
                began = time.perf_counter()
                os.pwrite(file.fileno(), data, 0)
                os.fdatasync(file.fileno())
                if number:  # the first makes room
                    taken.append(1000 * (time.perf_counter() - began))
        return percentile(taken, 50)


def request_body(prompt: int, stream: bool = False) -> bytes:
    """A chat request whose prompt has about so many tokens."""
    messages = [{"role": "user", "content": "word " * prompt}]
    return orjson.dumps({"model": "tiny", "messages": messages, "max_tokens": 512, "stream": stream})


async def block(
    port: int, paths: Sequence[str], body: bytes, requests: int, concurrency: int, pause: float = 0.0
) -> tuple[list[Timing], float]:
    """So many requests, so many at a time; and how long all of it took.

    The engine takes a fixed time, so that clients which are answered together ask together again, and wait
    for each other at each turn. With `pause` each rests for a random time of up to so many seconds before it
    asks.
    """
    connections = [await Connection.open("127.0.0.1", port) for _ in range(concurrency)]
    numbers = iter(range(requests))
    generator = random.Random(requests)
    timings: list[Timing] = []

    async def client(connection: Connection) -> None:
        for number in numbers:
            await asyncio.sleep(pause * generator.random())
            timing = await connection.send(paths[number % len(paths)], body)
            timings.append(timing)

    started = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    seconds = time.perf_counter() - started
    for connection in connections:
        connection.close()
    assert {timing.status for timing in timings} == {200}, {timing.status for timing in timings}
    return timings, seconds


class Compared(NamedTuple):
    """Timings through the proxy and without it, the proxy's processor seconds, wall seconds of its blocks."""

    through: list[Timing]
    bare: list[Timing]
    cpu: float
    seconds: float


async def compare(
    rig: Rig,
    size: str,
    body: bytes,
    requests: int,
    concurrency: int,
    blocks: int = 4,
    pause: float = 0.0,
) -> Compared:
    """Alternating blocks, after one to warm up."""
    suffix = f"/v1/chat/completions?/{size}"
    through: list[Timing] = []
    bare: list[Timing] = []
    cpu = seconds = 0.0
    for number in range(blocks + 1):
        before = rig.cpu()
        timings, took = await block(
            rig.proxy, [base + suffix for base in rig.bases], body, requests, concurrency, pause
        )
        used = rig.cpu() - before
        plain, _ = await block(rig.engine, [suffix], body, requests, concurrency, pause)
        if number:
            through += timings
            bare += plain
            cpu += used
            seconds += took
    return Compared(through, bare, cpu, seconds)


def added(compared: Compared, percent: float, of: str = "total") -> float:
    """Milliseconds that the proxy adds at a percentile."""
    through = percentile([getattr(each, of) for each in compared.through], percent)
    return 1000 * (through - percentile([getattr(each, of) for each in compared.bare], percent))


async def latencies(rig: Rig, scale: float) -> list[Row]:
    name = f"writing {RECORD_BYTES // 1024} KiB to the spool's disk, fdatasync included: p50"
    rows = [figure(name, "ms", rig.sync())]
    cases = (
        ("", PAUSE, ""),
        (", conversations that go on", PAUSE, "/same"),
        (", all at once", 0.0, ""),
    )
    for kind, pause, prompts in cases:
        size = f"4096/512/{WAIT_MS}{prompts}"
        found = await compare(rig, size, request_body(4096), int(400 * scale), 8, pause=pause)
        name = f"4,096/512 tokens at concurrency 8{kind}"
        judged = bool(pause)
        rows.append(figure(f"{name}: added p50", "ms", added(found, 50), "<= 1" if judged else ""))
        rows.append(figure(f"{name}: added p99", "ms", added(found, 99), "<= 5" if judged else ""))
        per_request = 1000 * found.cpu / len(found.through)
        rows.append(figure(f"{name}: proxy's processor a request", "ms", per_request, "<= 0.8"))
    body = request_body(32768)
    for kind, prompts in (("", ""), (", conversations that go on", "/same")):
        size = f"32768/1024/{WAIT_MS}{prompts}"
        found = await compare(rig, size, body, int(80 * scale), 4, pause=PAUSE)
        name = f"32,768/1,024 tokens at concurrency 4{kind}"
        rows.append(figure(f"{name}: added p50", "ms", added(found, 50), "<= 4"))
    body = request_body(4096, stream=True)
    found = await compare(rig, f"4096/64/{WAIT_MS}/5", body, int(100 * scale), 8, pause=PAUSE)
    rows.append(figure("stream: first byte delayed, p50", "ms", added(found, 50, "first"), "<= 1"))
    per_token = 1e6 * found.cpu / len(found.through) / 64
    rows.append(figure("stream: proxy's processor a token", "us", per_token))
    return rows


async def throughput(rig: Rig, scale: float) -> list[Row]:
    rows = []
    for prompt, answer, target, count in ((4096, 512, 596, 1500), (64, 64, None, 3000)):
        size = f"{prompt}/{answer}/20"
        found = await compare(rig, size, request_body(prompt), int(count * scale), 64, blocks=2)
        rate = len(found.through) / found.seconds
        wanted = f">= {target}" if target else ""
        rows.append(figure(f"{prompt:,}/{answer} tokens, concurrency 64: requests", "/s", rate, wanted))
        per_request = 1000 * found.cpu / len(found.through)
        rows.append(figure(f"{prompt:,}/{answer} tokens, concurrency 64: processor", "ms", per_request))
    return rows


async def profile(rig: Rig, scale: float) -> list[Row]:
    """Where the processor time of a request goes, with a sampling profiler in the proxy."""
    rows = []
    for concurrency, wait, pause, count in ((8, WAIT_MS, PAUSE, 1200), (64, 20, 0.0, 3000)):
        suffix, body = f"/v1/chat/completions?/4096/512/{wait}", request_body(4096)
        paths = [base + suffix for base in rig.bases]
        await block(rig.proxy, paths, body, 20 * concurrency, concurrency, pause)
        before = rig.parts()
        requests = int(count * scale)
        await block(rig.proxy, paths, body, requests, concurrency, pause)
        used = {part: seconds - before.get(part, 0.0) for part, seconds in rig.parts().items()}
        name = f"4,096/512 tokens at concurrency {concurrency}, profiled"
        rows.append(figure(f"{name}: processor", "ms", 1000 * sum(used.values()) / requests))
        most_first = sorted(used, key=lambda part: -used[part])
        rows += [figure(f"{name}: {part}", "ms", 1000 * used[part] / requests) for part in most_first]
    return rows


async def two_processes(rig: Rig, scale: float) -> list[Row]:
    """As `throughput`, with two processes: here they share their cores with the client, engine and store."""
    return [row | {"name": f"two processes: {row['name']}"} for row in await throughput(rig, scale)]


async def many_streams(rig: Rig, scale: float) -> list[Row]:
    """So many streams at one time, each of 20 tokens over ten seconds."""
    count = int(2000 * scale)
    body = request_body(64, stream=True)
    connections = [await Connection.open("127.0.0.1", rig.proxy) for _ in range(count)]
    suffix = "/v1/chat/completions?/64/20/3000/500"
    before = rig.process.memory_info().rss
    sent = [
        asyncio.create_task(connection.send(rig.bases[number % ATTEMPTS] + suffix, body))
        for number, connection in enumerate(connections)
    ]
    most, memory = 0, before
    while not all(task.done() for task in sent):
        state = await asyncio.to_thread(rig.state)
        most = max(most, state["in_flight"])
        memory = max(memory, rig.process.memory_info().rss)
        await asyncio.sleep(0.2)
    good = sum(task.result().status == 200 for task in sent)
    for connection in connections:
        connection.close()
    return [
        figure("streams at one time", "", most, f">= {count}"),
        figure("of them answered whole", "", good, f">= {count}"),
        figure("memory a stream", "KiB", (memory - before) / count / 1024),
    ]


async def overload(rig: Rig, scale: float) -> list[Row]:
    """Ten times as many requests at one time as are let in: the others are refused, memory stays bounded."""
    allowed, offered = 1000, int(10_000 * scale)
    body = request_body(4096)
    suffix = "/v1/chat/completions?/4096/512/500"
    before = rig.process.memory_info().rss
    peak = before
    done: list[int] = []

    async def one(number: int) -> None:
        connection = await Connection.open("127.0.0.1", rig.proxy)
        try:
            done.append((await connection.send(rig.bases[number % ATTEMPTS] + suffix, body)).status)
        finally:
            connection.close()

    sent = [asyncio.create_task(one(number)) for number in range(offered)]
    while not all(task.done() for task in sent):
        peak = max(peak, rig.process.memory_info().rss)
        await asyncio.sleep(0.05)
    for task in sent:
        task.result()
    served, refused = done.count(200), done.count(503)
    assert served + refused == offered, "something else than 200 and 503 came"
    return [
        figure(f"{offered:,} at one time, {allowed:,} let in: served", "", served),
        figure(f"{offered:,} at one time, {allowed:,} let in: refused with 503", "", refused),
        figure(
            f"{offered:,} at one time, {allowed:,} let in: memory grew by", "MiB", (peak - before) / 2**20
        ),
    ]


@contextlib.contextmanager
def processes(
    folder: Path, options: Sequence[str] = (), program: Sequence[str] = ("agl_grpc_cli",)
) -> Iterator[Rig]:
    """Engine, store and proxy, and attempts that are under way."""
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    with contextlib.ExitStack() as stack:
        engine = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fixed_engine"], stdout=subprocess.PIPE, text=True
        )
        stack.callback(_end, engine)
        assert engine.stdout is not None
        port = int(engine.stdout.readline())
        store = stack.enter_context(StoreProcess(folder / "store.db"))
        command = [
            sys.executable,
            "-m",
            *program,
            "proxy",
            "serve",
            "--port",
            "0",
            "--store",
            store.address,
        ]
        command += ["--upstream", f"http://127.0.0.1:{port}", "--spool-dir", str(folder / "spool"), *options]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        stack.callback(_end, proxy)
        assert proxy.stdout is not None
        line = proxy.stdout.readline()
        where = int(line.split("http://127.0.0.1:")[1].split(",")[0])
        with grpc.insecure_channel(store.address) as channel:
            stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
            started = [
                stub.StartRollout(store_service_pb2.StartRolloutRequest()).rollout for _ in range(ATTEMPTS)
            ]
        bases = [f"/rollout/{s.rollout.rollout_id}/attempt/{s.attempt.attempt_id}" for s in started]
        yield Rig(port, where, bases, psutil.Process(proxy.pid), folder)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(options: argparse.Namespace) -> list[Row]:
    # For this process and the engine; the proxy sees to itself.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parts = [latencies, throughput, profile, two_processes, many_streams, overload]
    rows: list[Row] = []
    for part in parts:
        if options.only not in ("", part.__name__):
            continue
        limits = {overload: ("--max-in-flight", "1000"), two_processes: ("--workers", "2")}.get(part, ())
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            profiled = ("benchmarks.profiled_proxy", str(folder / PARTS))
            program = profiled if part is profile else ("agl_grpc_cli",)
            rig = stack.enter_context(processes(folder, limits, program))
            rows += uvloop.run(part(rig, options.scale))
            rows.append(_all_stored(rig, part.__name__))
    return rows


def _all_stored(rig: Rig, name: str) -> Row:
    """Waits until what was captured is in the store, and fails when some of it is not."""
    until = time.monotonic() + 60
    while (state := rig.state())["spool_waiting"] and time.monotonic() < until:
        time.sleep(0.1)
    assert state["delivered"] == state["captured"], state
    assert not state["rejected"] + state["undurable"] + state["cut"], state
    return figure(f"{name}: calls captured and in the store", "", statistics.mean([state["delivered"]]))


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            scale=(1.0, "of the number of requests"),
            only=("", "only latencies, throughput, profile, two_processes, many_streams or overload"),
        )
    )
