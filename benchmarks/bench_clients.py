"""What the client of each language can do against one real store on disk, in the same run.

Span streaming: one stream, small spans in groups of 100, 64 groups under way, until the last is on disk.
Round trip: a credit is granted, the rollout that comes is completed, and the completion is on disk; one at a
time. Languages take turns within a run, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Row, figure, median, percentile, run
from benchmarks.servers import ROOT, folder, store_server
from tests.conformance.languages import CPP, GO, LANGUAGES, cpp_build
from tests.conformance.languages import run as run_in

GO_MEASURE = str(ROOT / ".venv-go" / "measure")

CPP_RELEASE = ROOT / ".venv-cpp" / "release"
"""Where the C++ client is built as its users build it: optimised."""

MEASURE = {
    "python": (sys.executable, "-m", "benchmarks.client_measure"),
    "go": (GO_MEASURE,),
    "cpp": (CPP, str(CPP_RELEASE / "measure")),
    "typescript": ("node", str(LANGUAGES["typescript"].folder / "dist" / "conformance" / "measure.js")),
}

SHARE = {"go": 1.0, "cpp": 1.0, "typescript": 0.5}
"""Of Python's rate that a language has to reach."""


def build() -> None:
    """Builds every client, with the programs that measure."""
    for name in MEASURE.keys() - {"cpp"}:
        LANGUAGES[name].make()
    for command in cpp_build(CPP_RELEASE, "Release", "measure"):
        run_in(command, LANGUAGES["cpp"].folder)
    run_in((GO, "build", "-o", GO_MEASURE, "./cmd/measure"), LANGUAGES["go"].folder)


def measured(command: Sequence[str], spans: int, rounds: int) -> dict[str, Any]:
    """One program on a store of its own."""
    with folder() as place, store_server(place / "store.db") as store:
        arguments = (*command, store.address, str(spans), str(rounds))
        done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    build()
    turns = [
        {name: measured(command, options.spans, options.rounds) for name, command in MEASURE.items()}
        for _ in range(options.turns)
    ]
    rates = {name: median([turn[name]["spans_per_second"] for turn in turns]) for name in MEASURE}
    rows = []
    for name in MEASURE:
        target = f">= {SHARE[name]:g} of Python's" if name in SHARE else ""
        row = figure(
            f"spans streamed, {name}",
            "spans/s",
            rates[name],
            target,
            peer=rates["python"],
            peer_name="Python",
        )
        rows.append(row)
    for name in MEASURE:
        trips = [one for turn in turns for one in turn[name]["round_trips_ms"]]
        rows.append(
            figure(
                f"lease to completion and back, {name}, p50",
                "ms",
                percentile(trips, 50),
                "<= 2",
                p99=percentile(trips, 99),
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            spans=(100_000, "spans of each stream"),
            rounds=(500, "round trips"),
            turns=(2, "turns of all languages; the median counts"),
        )
    )
