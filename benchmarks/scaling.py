"""Past one machine, in arithmetic and in simulation: `python -m benchmarks.scaling`.

Reckons what a fleet of so many concurrent rollouts asks of store servers, disks, workers and engines, from
the costs that `make bench NAMES=costs` has measured last, and lets a discrete-event simulation say how long
acknowledgements take there. Prints the tables of docs/scaling.md and writes them to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import sys
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import simpy

from benchmarks.__main__ import RESULTS
from benchmarks.figures import percentile

SIZES = (1_000, 10_000, 100_000)
BUSY = 0.7
"""Share of a resource that may be used in steady state: beyond it queues grow quickly."""

DISK_BYTES = 200e6
"""What one machine's disk takes in a second, written twice (log and table); a plain cloud volume."""


@dataclass(frozen=True)
class Workload:
    """What one rollout does: a multi-turn agent.

    Attributes:
        seconds: How long it takes.
        calls: Model calls of 1,280 tokens.
        spans: Other spans of 700 bytes.
        renew_every: Seconds between two renewals of its lease.
        per_worker: Rollouts that a worker process holds at once.
        tokens: Tokens that an engine samples for one call.
        engine_tokens: Tokens that an engine samples in a second.
        worker_cpu: Seconds of a core that the agent's own process needs for a rollout.
    """

    seconds: float = 60.0
    calls: int = 8
    spans: int = 32
    renew_every: float = 10.0
    per_worker: int = 32
    tokens: int = 256
    engine_tokens: float = 2_500.0
    worker_cpu: float = 0.05


@dataclass(frozen=True)
class Costs:
    """Measured costs: seconds of a store server's core, seconds, bytes on disk."""

    life: float
    renewal: float
    span: float
    call: float
    sync: float
    life_bytes: float
    span_bytes: float
    call_bytes: float
    shared_life: float
    database_life: float

    @classmethod
    def measured(cls) -> Costs:
        """The newest result that holds them.

        Raises:
            SystemExit: There is none; says how to make one.
        """
        for path in sorted(RESULTS.glob("*.json"), reverse=True):
            rows = json.loads(path.read_text()).get("results", {}).get("costs")
            if rows:
                print(f"costs from benchmarks/results/{path.name}")
                return cls._of({row["name"]: row for row in rows})
        raise SystemExit("no measured costs; run `make bench NAMES=costs` first")

    @classmethod
    def _of(cls, rows: dict[str, dict[str, Any]]) -> Costs:
        value, micro = {name: row["value"] for name, row in rows.items()}, 1e-6
        # What whole rollouts really took is more than their units add up to: all of them are raised alike.
        cpu, size = (
            rows[f"{what} of a rollout of 8 model calls and 32 spans"]
            for what in ("server CPU", "bytes on disk")
        )
        more_cpu, more_size = cpu["value"] / cpu["peer"], size["value"] / size["peer"]
        return cls(
            life=value["server CPU of a life with one span, 32 a call"] * micro * more_cpu,
            renewal=value["server CPU of a renewed lease, 32 a call"] * micro,
            span=value["server CPU of a 700-byte span"] * micro * more_cpu,
            call=value["server CPU of a 1,280-token model call"] * micro * more_cpu,
            sync=value["making 32 KiB durable on this disk"] / 1000,
            life_bytes=value["bytes on disk of a life with one span"] * more_size,
            span_bytes=value["bytes on disk of a 700-byte span"] * more_size,
            call_bytes=value["bytes on disk of a 1,280-token model call"] * more_size,
            shared_life=value["servers' CPU of a life with one span on PostgreSQL, 32 a call"] * micro,
            database_life=value["PostgreSQL's CPU of a life with one span, 32 a call"] * micro,
        )


@dataclass(frozen=True)
class Demand:
    """What so many concurrent rollouts ask for, all partitions together."""

    lives: float
    store_cores: float
    shared_lock: float
    disk_bytes: float
    rollout_bytes: float
    workers: int
    engines: int


def demand(count: int, load: Workload, costs: Costs) -> Demand:
    """The arithmetic of docs/scaling.md."""
    lives = count / load.seconds
    rollout_bytes = costs.life_bytes + load.spans * costs.span_bytes + load.calls * costs.call_bytes
    traffic = load.spans * costs.span + load.calls * costs.call
    renewals = load.seconds / load.renew_every * costs.renewal
    return Demand(
        lives=lives,
        store_cores=lives * (costs.life + renewals + traffic),
        # On PostgreSQL writers take turns: the work of servers and database on lifecycle happens one by one.
        shared_lock=lives * (costs.shared_life + costs.database_life),
        disk_bytes=lives * rollout_bytes,
        rollout_bytes=rollout_bytes,
        workers=math.ceil(count / load.per_worker),
        engines=math.ceil(lives * load.calls * load.tokens / load.engine_tokens / BUSY),
    )


def partitions(wanted: Demand) -> int:
    """Stores, each with runs of its own, that carry the demand."""
    return max(
        1,
        math.ceil(wanted.store_cores / BUSY),
        math.ceil(2 * wanted.disk_bytes / (BUSY * DISK_BYTES)),
    )


class Waiting(NamedTuple):
    """A request: when it came, seconds of the core that it needs, its acknowledgement."""

    begun: float
    cost: float
    done: simpy.Event


class Store:
    """One store server in the simulation: one core, one writer that commits groups.

    A server that is alone with its file brings a commit to the disk while it works on the next group, and is
    never further ahead. Servers over one database wait for the disk within their turn.

    Args:
        env: Simulated time.
        sync: Seconds that a commit needs to reach the disk.
        lock: What the writers of several servers over one database take turns with; None = it is alone.
    """

    def __init__(self, env: simpy.Environment, sync: float, lock: simpy.Resource | None = None) -> None:
        self._env = env
        self._sync = sync
        self._lock = lock
        self._disk = simpy.Resource(env)
        self._waiting: deque[Waiting] = deque()
        self._wake = env.event()
        self.busy = 0.0
        self.most_waiting = 0
        self.latencies: list[float] = []
        env.process(self._write())

    def do(self, cost: float) -> simpy.Event:
        """A request that needs so many seconds of the core; the event is its acknowledgement."""
        done = self._env.event()
        self._waiting.append(Waiting(self._env.now, cost, done))
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        if not self._wake.triggered:
            self._wake.succeed()
        return done

    def _write(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if not self._waiting:
                self._wake = self._env.event()
                yield self._wake
            group, work = list[Waiting](), 0.0
            # A group closes at 20 ms of work, as the writer's does.
            while self._waiting and work < 0.02:
                one = self._waiting.popleft()
                group.append(one)
                work += one.cost
            self.busy += work
            if self._lock is not None:
                with self._lock.request() as turn:
                    yield turn
                    yield self._env.timeout(work + self._sync)
                self._acknowledge(group)
                continue
            yield self._env.timeout(work)
            alone = not self._waiting and not self._disk.count
            turn = self._disk.request()
            yield turn
            synced = self._env.process(self._bring_to_disk(turn, group))
            if alone:  # a writer with nothing else to do syncs by itself, and does nothing else meanwhile
                yield synced

    def _bring_to_disk(
        self, turn: simpy.resources.resource.Request, group: Sequence[Waiting]
    ) -> Generator[simpy.Event, Any, None]:
        with turn:
            yield self._env.timeout(self._sync)
        self._acknowledge(group)

    def _acknowledge(self, group: Sequence[Waiting]) -> None:
        for one in group:
            self.latencies.append(self._env.now - one.begun)
            one.done.succeed()


@dataclass(frozen=True)
class Simulated:
    """What the simulation says of one store."""

    core: float
    p50: float
    p99: float
    waiting: int


def simulate(lives: float, load: Workload, costs: Costs, seed: int, seconds: float) -> Simulated:
    """One store on which so many rollouts begin in a second, for so long."""
    env = simpy.Environment()
    choose = random.Random(seed)
    store = Store(env, costs.sync)
    step = load.seconds / (load.calls + 1)
    part = costs.call + load.spans / load.calls * costs.span
    renewals = costs.renewal * step / load.renew_every

    def rollout(left: int) -> Generator[simpy.Event, Any, None]:
        # In steady state rollouts of every age are there from the start.
        if left == load.calls:
            yield store.do(costs.life / 2)
        for _ in range(left):
            yield env.timeout(choose.expovariate(1 / step))
            yield store.do(part + renewals)
        yield env.timeout(choose.expovariate(1 / step))
        yield store.do(costs.life / 2)

    def arrivals() -> Generator[simpy.Event, Any, None]:
        for _ in range(int(lives * load.seconds)):
            env.process(rollout(choose.randint(0, load.calls - 1)))
        while True:
            yield env.timeout(choose.expovariate(lives))
            env.process(rollout(load.calls))

    env.process(arrivals())
    env.run(until=seconds)
    found = store.latencies[len(store.latencies) // 5 :] or [math.inf]
    return Simulated(
        store.busy / seconds, 1000 * percentile(found, 50), 1000 * percentile(found, 99), store.most_waiting
    )


def report(load: Workload, costs: Costs, seed: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each size, with one store and with as many as it takes."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        wanted = demand(size, load, costs)
        for stores in sorted({1, partitions(wanted)}):
            found = simulate(wanted.lives / stores, load, costs, seed, seconds)
            rows.append({"rollouts": size, "stores": stores, **vars(wanted), **vars(found)})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    heads = (
        "concurrent rollouts",
        "stores",
        "lives/s",
        "store cores",
        "PostgreSQL write lock",
        "disk MB/s",
        "TB/day",
        "workers",
        "engines",
        "core busy",
        "ack p50 ms",
        "ack p99 ms",
        "most waiting",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = (
            f"{row['rollouts']:,}",
            row["stores"],
            f"{row['lives']:,.0f}",
            f"{row['store_cores']:.2f}",
            f"{row['shared_lock']:.0%}",
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['disk_bytes'] * 86_400 / 1e12:.2f}",
            f"{row['workers']:,}",
            f"{row['engines']:,}",
            f"{row['core']:.0%}",
            f"{row['p50']:.1f}",
            f"{row['p99']:.1f}",
            f"{row['waiting']:,}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> int:
    """Prints and writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the simulation (default 1)")
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated time (default 20)")
    options = parser.parse_args()
    load, costs = Workload(), Costs.measured()
    rows = report(load, costs, options.seed, options.seconds)
    print("\n".join(table(rows)))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    body = {"seed": options.seed, "workload": vars(load), "costs": vars(costs), "rows": rows}
    (RESULTS / f"scaling-{stamp}.json").write_text(json.dumps(body, indent=1) + "\n")
    print(f"written: benchmarks/results/scaling-{stamp}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
