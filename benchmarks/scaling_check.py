"""The simulation of `benchmarks.scaling` beside two real servers over one PostgreSQL database.

`python -m benchmarks.scaling_check`: measures what one append costs there (one at a time, and with so many
under way that the write lock never rests), then offers appends at random moments at shares of the highest
rate, to the real servers and to simulated ones with these two costs. Prints both and writes them to
`benchmarks/results/`. Costs and runs are of the same minutes: other work on the machine changes both.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Generator, Sequence
from typing import Any

import simpy

from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks import machine
from benchmarks.__main__ import RESULTS
from benchmarks.clients import on_loop
from benchmarks.database import make_attempts
from benchmarks.figures import percentile
from benchmarks.messages import Attempt, Calls, plain_span
from benchmarks.scaling import Store
from benchmarks.servers import store_server
from tests.support.postgres import PostgresServer

SHARES = (0.25, 0.5, 0.75)
"""Of the highest rate."""
SPANS = 5
"""Of one append: a turn of an agent."""
UNDER_WAY = 64
"""Appends under way, over both servers, when the highest rate is measured."""

Seen = dict[str, float]


class Load:
    """Appends to all servers in turn.

    Args:
        addresses: Of the servers.
        attempts: Whose spans they are.
        choose: Of all that is random.
    """

    def __init__(self, addresses: Sequence[str], attempts: list[Attempt], choose: random.Random) -> None:
        self._calls = [Calls(address, False) for address in addresses]
        self._attempts = attempts
        self._choose = choose
        self._spans = [plain_span(number) for number in range(SPANS)]
        self._next = 0

    async def append(self) -> float:
        """Seconds from the call to the acknowledgement."""
        self._next += 1
        for span in self._spans:
            span.span_id = os.urandom(8)
        rollout_id, attempt_id = self._choose.choice(self._attempts)
        group = span_pb2.AttemptSpans(rollout_id=rollout_id, attempt_id=attempt_id, spans=self._spans)
        begun = time.perf_counter()
        call: Awaitable[Any] = self._calls[self._next % len(self._calls)].append(
            store.AppendSpansRequest(groups=[group])
        )
        await call
        return time.perf_counter() - begun

    async def one_by_one(self, seconds: float) -> float:
        """Median seconds of an append when nothing else goes on."""
        end, took = time.perf_counter() + seconds, list[float]()
        while time.perf_counter() < end:
            took.append(await self.append())
        return percentile(took, 50)

    async def at_most(self, seconds: float) -> float:
        """Appends a second when so many are always under way."""
        end, count = time.perf_counter() + seconds, 0

        async def again() -> None:
            nonlocal count
            while time.perf_counter() < end:
                await self.append()
                count += 1

        begun = time.perf_counter()
        await asyncio.gather(*(again() for _ in range(UNDER_WAY)))
        return count / (time.perf_counter() - begun)

    async def offered(self, rate: float, seconds: float) -> Seen:
        """Appends begin at random moments, so many a second, whether others are answered or not."""
        begun = time.perf_counter()
        due, calls = begun, list[asyncio.Task[float]]()
        while (due := due + self._choose.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.append(asyncio.create_task(self.append()))
        took = await asyncio.gather(*calls)
        return seen(took, time.perf_counter() - begun)

    async def close(self) -> None:
        """Closes its connections."""
        for calls in self._calls:
            await calls.channel.close()


def seen(took: Sequence[float], seconds: float) -> Seen:
    """What acknowledgements that took so long come to."""
    return {
        "rate": len(took) / seconds,
        "p50_ms": 1000 * percentile(took, 50),
        "p99_ms": 1000 * percentile(took, 99),
    }


def simulated(rate: float, cost: float, sync: float, servers: int, seconds: float, seed: int) -> Seen:
    """The same on simulated servers that take turns."""
    env, choose = simpy.Environment(), random.Random(seed)
    lock = simpy.Resource(env)
    stores = [Store(env, sync, lock) for _ in range(servers)]

    def arrivals() -> Generator[simpy.Event, Any, None]:
        number = 0
        while True:
            yield env.timeout(choose.expovariate(rate))
            stores[number % servers].do(cost)
            number += 1

    env.process(arrivals())
    env.run(until=seconds)
    return seen([took for one in stores for took in one.latencies], seconds)


async def compare(addresses: Sequence[str], seconds: float, seed: int) -> dict[str, Any]:
    """Costs, and real beside simulated for each share."""
    attempts = await make_attempts(addresses[0])
    load = Load(addresses, attempts, random.Random(seed))
    await load.at_most(1.0)  # connections and caches are warm after that
    alone, most = await load.one_by_one(seconds), await load.at_most(seconds)
    # alone = sync + cost; with as many as there are, a server's group has its share of them.
    group = UNDER_WAY / len(addresses)
    cost = max(1e-6, (group / most - alone) / (group - 1))
    sync = max(1e-6, alone - cost)
    rows = []
    for share in SHARES:
        real = await load.offered(share * most, seconds)
        model = simulated(share * most, cost, sync, len(addresses), seconds, seed)
        rows.append({"share": share, "offered": share * most, "real": real, "simulated": model})
    await load.close()
    return {
        "alone_ms": 1000 * alone,
        "most": most,
        "cost_us": 1e6 * cost,
        "sync_ms": 1000 * sync,
        "rows": rows,
    }


def table(found: dict[str, Any]) -> list[str]:
    """The rows in Markdown."""
    heads = ("share of the most", "offered/s", "done/s", "p50 ms", "p99 ms", "simulated p50 ms", "p99 ms")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found["rows"]:
        real, model = row["real"], row["simulated"]
        cells = (
            *(f"{row['share']:.0%}", f"{row['offered']:,.0f}", f"{real['rate']:,.0f}"),
            *(f"{one[name]:.1f}" for one in (real, model) for name in ("p50_ms", "p99_ms")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Measures, simulates, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement (default 6)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and choices (default 1)")
    options = parser.parse_args()
    postgres = PostgresServer()
    postgres.start()
    try:
        url = postgres.make_database()
        with store_server(url) as one, store_server(url) as two:
            found = on_loop(compare([one.address, two.address], options.seconds, options.seed))
    finally:
        postgres.stop()
    busy = os.getloadavg()[0]
    print(f"one append alone {found['alone_ms']:.2f} ms; at most {found['most']:,.0f}/s; load {busy:.1f}")
    print("\n".join(table(found)))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    body = {"measured": stamp, "machine": machine.describe(), "load_average": busy, **found}
    (RESULTS / f"scaling-check-{stamp}.json").write_text(json.dumps(body, indent=1) + "\n")
    print(f"written: benchmarks/results/scaling-check-{stamp}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
