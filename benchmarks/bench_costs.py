"""What a store server and its database cost, unit by unit: processor time and bytes on disk.

`benchmarks.scaling` reckons with these figures. Processor time does not depend on who else uses the machine,
so they hold on a busy one too. Whole rollouts stand beside what the units add up to. At the end two servers
over one PostgreSQL database do the same lives at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import sys
import time
import uuid
from pathlib import Path

import psutil

from agl_grpc.v1 import runner_service_pb2 as runner
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks import ingest, lives, processor
from benchmarks.clients import Start, run_clients
from benchmarks.database import make_attempts
from benchmarks.figures import Row, figure, median, run
from benchmarks.messages import RUNNER, Calls, call_span, completion, lease_request, plain_span, spec
from benchmarks.servers import folder, store_server
from tests.support.postgres import PostgresServer

BATCH = 32
"""Rollouts of an enqueue, of a lease and of a completion; leases of a renewal."""

TURNS, SPANS_PER_TURN = 8, 4
LIFE_CPU = "server CPU of a life with one span, 32 a call"
LIFE_BYTES = "bytes on disk of a life with one span"
SPAN_CPU, SPAN_BYTES_ = "server CPU of a 700-byte span", "bytes on disk of a 700-byte span"
CALL_CPU, CALL_BYTES = "server CPU of a 1,280-token model call", "bytes on disk of a 1,280-token model call"
IDLE_SECONDS = 3.0
"""What servers and PostgreSQL use without any load, over so long, is taken off."""


async def renew_for(start: Start, address: str, seconds: float) -> int:
    """Renews the leases of one worker again and again; how many leases were renewed."""
    calls = Calls(address, False)
    queue = f"q-{os.getpid()}"
    await calls.enqueue(store.EnqueueRolloutsRequest(rollouts=[spec(queue)] * BATCH))
    answer = await calls.lease(lease_request(queue, uuid.uuid4().hex, BATCH))
    leases = [
        runner.HeldLease(attempt_id=one.lease.attempt_id, lease_token=one.lease.lease_token)
        for one in answer.rollouts
    ]
    request = runner.RenewLeasesRequest(worker_id=queue, leases=leases)
    renew = calls.channel.unary_unary(f"{RUNNER}RenewLeases")
    await start()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        await renew(request.SerializeToString())
        count += BATCH
    await calls.channel.close()
    return count


async def whole_rollouts(start: Start, address: str, seconds: float) -> int:
    """Takes rollouts of an agent with several turns through their life; how many."""
    calls = Calls(address, False)
    queue = f"q-{os.getpid()}"
    model_call = call_span(0)
    await start()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        identity = uuid.uuid4().hex
        await calls.enqueue(store.EnqueueRolloutsRequest(request_id=identity, rollouts=[spec(queue)] * BATCH))
        leases = [one.lease for one in (await calls.lease(lease_request(queue, identity, BATCH))).rollouts]
        for _ in range(TURNS):
            request = store.AppendSpansRequest()
            for lease in leases:
                model_call.span_id = os.urandom(8)
                spans = [model_call, *(plain_span() for _ in range(SPANS_PER_TURN))]
                request.groups.add(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, spans=spans)
            await calls.append(request)
        completions = [completion(lease) for lease in leases]
        await calls.complete(
            runner.CompleteAttemptsRequest(request_id=identity, worker_id=queue, completions=completions)
        )
        count += len(leases)
    await calls.channel.close()
    return count


def checked(database: Path, seconds: float, rows: list[Row]) -> list[Row]:
    """Whole rollouts, beside what the units add up to."""
    unit = {row["name"]: row["value"] for row in rows}
    before = sizes(database)
    with store_server(database) as server:
        found = run_clients(server, 1, whole_rollouts, server.address, seconds)
    after = sizes(database)
    (count,) = found.results
    plain = TURNS * SPANS_PER_TURN
    cpu = unit[LIFE_CPU] + (plain - 1) * unit[SPAN_CPU] + TURNS * unit[CALL_CPU]
    size = unit[LIFE_BYTES] + (plain - 1) * unit[SPAN_BYTES_] + TURNS * unit[CALL_BYTES]
    title = f"a rollout of {TURNS} model calls and {plain} spans"
    reckoned = "reckoned from the units"
    return [
        figure(f"server CPU of {title}", "us", 1e6 * found.server_cpu / count, peer=cpu, peer_name=reckoned),
        figure(
            f"bytes on disk of {title}", "B", (after[0] - before[0]) / count, peer=size, peer_name=reckoned
        ),
    ]


def sizes(database: Path) -> tuple[int, int, int]:
    """Bytes of a database that no server has open, its rollouts and its spans."""
    db = sqlite3.connect(database)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (rollouts,) = db.execute("SELECT count(*) FROM rollouts").fetchone()
    (spans,) = db.execute("SELECT count(*) FROM spans").fetchone()
    db.close()
    return database.stat().st_size, rollouts, spans


def sync_milliseconds(place: Path) -> float:
    """How long this disk takes to make 32 KiB durable."""
    took = []
    with (place / "probe").open("wb") as probe:
        for _ in range(100):
            probe.write(bytes(32 << 10))
            probe.flush()
            begun = time.perf_counter()
            os.fsync(probe.fileno())
            took.append(1000 * (time.perf_counter() - begun))
    return median(took)


def on_sqlite(place: Path, seconds: float) -> list[Row]:
    """One server on a file."""
    rows = [figure("making 32 KiB durable on this disk", "ms", sync_milliseconds(place))]
    database = place / "store.db"
    with store_server(database) as server:
        attempts = asyncio.run(make_attempts(server.address))
    before = sizes(database)
    with store_server(database) as server:
        life = lives.rate_of(server, False, BATCH, seconds, loops=2)
        rows.append(figure(LIFE_CPU, "us", life.server_cpu))
        rows.append(figure("clients' CPU of a life with one span, 32 a call", "us", life.client_cpu))
        renewal = run_clients(server, 1, renew_for, server.address, seconds / 2)
        cpu = 1e6 * renewal.server_cpu / renewal.results[0]
        rows.append(figure("server CPU of a renewed lease, 32 a call", "us", cpu))
    after = sizes(database)
    made = after[1] - before[1]
    rows.append(figure(LIFE_BYTES, "B", (after[0] - before[0]) / made))
    for kind, size, cpu_title, bytes_title in (
        ("spans", 100, SPAN_CPU, SPAN_BYTES_),
        ("calls", 16, CALL_CPU, CALL_BYTES),
    ):
        before = after
        with store_server(database) as server:
            found = ingest.rate_of(server, ingest.Kind(kind, size), attempts, 1, seconds)
        after = sizes(database)
        rows.append(figure(cpu_title, "us", found.server_cpu))
        rows.append(figure(bytes_title, "B", (after[0] - before[0]) / (after[2] - before[2])))
    return rows + checked(database, seconds, rows)


async def live_on_all(start: Start, addresses: list[str], seconds: float) -> float:
    """Lives on several servers at once; how many."""
    connected: asyncio.Task[None] | None = None

    async def start_once() -> None:
        nonlocal connected
        if connected is None:
            connected = asyncio.ensure_future(start())
        await asyncio.shield(connected)

    some = [lives.live_for(start_once, address, False, BATCH, 2, seconds) for address in addresses]
    return seconds * sum(await asyncio.gather(*some))


def on_postgres(seconds: float) -> list[Row]:
    """Two servers over one database."""
    postgres = PostgresServer()
    postgres.start()
    try:
        url = postgres.make_database()
        with store_server(url) as one, store_server(url) as two:

            def used() -> tuple[float, float, float]:
                return time.perf_counter(), one.cpu + two.cpu, postgres_cpu(postgres)

            begun = used()
            time.sleep(IDLE_SECONDS)
            idle = used()
            found = run_clients(one, 2, live_on_all, [one.address, two.address], seconds)
            end = used()
    finally:
        postgres.stop()
    # The warm-up is a batch on each loop of each client and server.
    count = sum(found.results) + 2 * 2 * 2 * BATCH
    servers_cpu, database_cpu = (
        (last - middle) - (middle - first) * (end[0] - idle[0]) / (idle[0] - begun[0])
        for first, middle, last in zip(begun[1:], idle[1:], end[1:], strict=True)
    )
    return [
        figure(
            "lives of two servers over one PostgreSQL database, 32 a call",
            "/s",
            sum(found.results) / found.seconds,
        ),
        figure(
            "servers' CPU of a life with one span on PostgreSQL, 32 a call", "us", 1e6 * servers_cpu / count
        ),
        figure("PostgreSQL's CPU of a life with one span, 32 a call", "us", 1e6 * database_cpu / count),
    ]


def postgres_cpu(postgres: PostgresServer) -> float:
    """Seconds of CPU of all its processes that live."""
    return processor.seconds_of_all(psutil.Process(postgres.pid))


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    with folder() as place:
        return on_sqlite(place, options.seconds) + on_postgres(options.seconds)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, seconds=(4.0, "length of each measurement")))
