"""How costs grow with what there is: rows, rollouts, spans of a rollout, workers, watchers. A picture each.

Latencies change with whatever else the machine does; beside each stands the server's CPU, which does not.
Costs are CPU or latency for one unit of work. `expected` is how a cost may grow with x and still only be the
work itself: 0 = not at all (a cost of one thing among many), 1 = in proportion (a cost of all of them).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sqlite3
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks import ingest, lives
from benchmarks.bench_dispatch import arrivals, from_commit, helpers, publish, watch
from benchmarks.bench_size import crowd, read_back
from benchmarks.clients import on_loop
from benchmarks.database import grown
from benchmarks.figures import Row, figure, median, percentile, run
from benchmarks.messages import STORE, Attempt, Calls, spec, store
from benchmarks.servers import Server, folder, store_server, traced_server

T = TypeVar("T")

PICTURES = Path(__file__).parent / "results"
_READS, _VERSIONS = 20, 8
"""How often what is measured by CPU is done: the clock of CPU ticks each 10 ms."""
TOLERANCE = 0.15
"""How much faster than expected, as a power of x, still counts as noise."""


class Series(NamedTuple):
    """One cost.

    Attributes:
        name: What it is the cost of.
        unit: Of the cost.
        x: What grows.
        points: (x, cost).
        expected: Power of x that is the work itself.
    """

    name: str
    unit: str
    x: str
    points: Sequence[tuple[float, float]]
    expected: int

    @property
    def power(self) -> float:
        """The power of x with which the cost grows: the slope between the ends, where x is not 0."""
        (x0, y0), *_, (x1, y1) = [point for point in self.points if point[0]]
        return math.log(y1 / y0) / math.log(x1 / x0)


def database_size(place: Path, sizes: Sequence[int], seconds: float) -> list[Series]:
    """Ingest, restart and bytes on disk against spans in the database."""
    spans, calls, starting, starting_cpu = [], [], [], []
    for size in sizes:
        database = place / f"rows-{size}.db"
        attempts = grown(database, size)
        with store_server(database) as server:
            starting.append((size, server.starting))
            starting_cpu.append((size, server.cpu))
        spans.append((size, _written(database, ingest.Kind("spans", 100), attempts, seconds)))
        calls.append((size, _written(database, ingest.Kind("calls", 16), attempts, seconds)))
        _files(database, Path.unlink)
    x = "spans in the database"
    return [
        Series("server CPU of a span", "us", x, [(size, one.cpu) for size, one in spans], 0),
        Series("bytes on disk of a span", "bytes", x, [(size, one.size) for size, one in spans], 0),
        Series("server CPU of a model call", "us", x, [(size, one.cpu) for size, one in calls], 0),
        Series("bytes on disk of a model call", "bytes", x, [(size, one.size) for size, one in calls], 0),
        Series("restart to serving", "s", x, starting, 0),
        Series("server CPU of a restart", "s", x, starting_cpu, 0),
    ]


class _Cost(NamedTuple):
    """Of one span: microseconds of the server's CPU, and bytes that its database grew by."""

    cpu: float
    size: float


def _written(database: Path, kind: ingest.Kind, attempts: list[Attempt], seconds: float) -> _Cost:
    """Streams spans into a database and stops its server, which leaves no write-ahead log behind."""
    before, have = _size(database), _count(database)
    with store_server(database) as server:
        found = ingest.rate_of(server, kind, attempts, 2, seconds)
    return _Cost(found.server_cpu, (_size(database) - before) / (_count(database) - have))


def _files(database: Path, each: Callable[[Path], T]) -> list[T]:
    return [each(file) for file in sorted(database.parent.glob(f"{database.name}*"))]


def _size(database: Path) -> int:
    return sum(_files(database, lambda file: file.stat().st_size))


def _count(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database)) as db:
        (count,) = db.execute("SELECT coalesce(max(span_key), 0) FROM spans").fetchone()
    return int(count)


def rollout_count(place: Path, counts: Sequence[int], seconds: float) -> list[Series]:
    """Lives and memory against rollouts that are queued for somebody else."""
    cpu, memory, have = [], [], 0
    with store_server(place / "rollouts.db") as server:
        for count in counts:
            on_loop(_enqueue(server, count - have))
            have = count
            found = lives.rate_of(server, False, 1, seconds)
            cpu.append((count, found.server_cpu))
            memory.append((count, server.rss))
    x = "rollouts queued"
    return [
        Series("server CPU of a life", "us", x, cpu, 0),
        Series("memory with rollouts", "MiB", x, memory, 0),
    ]


async def _enqueue(server: Server, count: int) -> None:
    calls = Calls(server.address, False)
    for start in range(0, count, 500):
        specs = [spec("nobody-serves-this")] * min(500, count - start)
        await calls.enqueue(store.EnqueueRolloutsRequest(request_id=uuid.uuid4().hex, rollouts=specs))
    await calls.channel.close()


def spans_of_rollout(place: Path, counts: Sequence[int]) -> list[Series]:
    """Reading a rollout back against its spans."""
    database = place / "spans.db"
    attempts = grown(database, 0, len(counts))
    took, cpu = [], []
    with store_server(database) as server:
        for count, attempt in zip(counts, attempts, strict=True):
            took.append((count, on_loop(read_back(server.address, attempt, count, 3))[0]))
            before = server.cpu
            on_loop(_read(server.address, attempt[0]))
            cpu.append((count, 1000 * (server.cpu - before) / _READS))
    x = "spans of the rollout"
    return [
        Series("reading all spans of a rollout", "ms", x, took, 1),
        Series("server CPU of reading all spans", "ms", x, cpu, 1),
    ]


async def _read(address: str, rollout_id: str) -> None:
    calls = Calls(address, False)
    method = calls.channel.unary_unary(f"{STORE}ListSpans")
    request = store.ListSpansRequest(rollout_id=rollout_id, page_size=10_000).SerializeToString()
    for _ in range(_READS):
        await method(request)
    await calls.channel.close()


def worker_count(place: Path, counts: Sequence[int], rollouts: int) -> list[Series]:
    """Dispatch and memory against connected workers."""
    middle, last, memory = [], [], []
    for count in counts:
        with traced_server(place / f"workers-{count}.db") as (server, trace):
            times = arrivals(server, False, count, rollouts)
        found = from_commit(times, trace)
        middle.append((count, median(found)))
        last.append((count, percentile(found, 99)))
        with store_server(place / f"crowd-{count}.db") as server:
            memory.append((count, on_loop(crowd(server, 0, count))))
    x = "workers waiting"
    return [
        Series("commit to receipt, p50", "ms", x, middle, 0),
        Series("commit to receipt, p99", "ms", x, last, 0),
        Series("memory with workers", "MiB", x, memory, 1),
    ]


def watcher_count(place: Path, counts: Sequence[int]) -> list[Series]:
    """The last watcher's new version against watchers: each is one more message."""
    last, cpu = [], []
    with store_server(place / "watchers.db") as server:
        for count in counts:
            with helpers(watch, server.address, count // 2) as results:
                before = server.cpu
                found = on_loop(publish(server.address, _VERSIONS, count, results))
                cpu.append((count, 1000 * (server.cpu - before) / _VERSIONS))
            last.append((count, percentile(found, 99)))
    return [
        Series("new version at watchers, p99", "ms", "watchers", last, 1),
        Series("server CPU of a new version", "ms", "watchers", cpu, 1),
    ]


def draw(series: Series) -> str:
    """Writes the picture; returns its name."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(*zip(*series.points, strict=True), marker="o")
    axes.set(xlabel=series.x, ylabel=f"{series.name} ({series.unit})", ylim=(0, None))
    axes.grid(alpha=0.3)
    name = "growth-" + series.name.replace(",", "").replace(" ", "-") + ".png"
    plot.savefig(PICTURES / name, dpi=110)
    plt.close(plot)
    return name


def measure(options: argparse.Namespace) -> list[Row]:
    """All series: the cost at the largest x, and the power with which it grew."""
    scale, seconds = options.scale, options.seconds
    PICTURES.mkdir(exist_ok=True)
    with folder() as place:
        found = [
            *database_size(place, [0, int(250_000 * scale), int(1_000_000 * scale)], seconds),
            *rollout_count(place, [0, int(10_000 * scale), int(40_000 * scale)], seconds),
            *spans_of_rollout(place, [500, 2_500, 10_000]),
            *worker_count(place, [16, 128, 512], options.count),
            *watcher_count(place, [100, 300, 1_000]),
        ]
    rows = []
    for series in found:
        x, cost = series.points[-1]
        faster = series.power > series.expected + TOLERANCE
        row = figure(f"{series.name}, {x:,.0f} {series.x}", series.unit, cost, power=round(series.power, 2))
        row |= {"points": series.points, "picture": draw(series), "faster_than_the_work": faster}
        row["name"] += f" (grows as x^{series.power:.2f}{', faster than the work' if faster else ''})"
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            seconds=(2.5, "length of each throughput measurement"),
            count=(150, "rollouts in each latency measurement"),
            scale=(1.0, "how large the large databases are"),
        )
    )
