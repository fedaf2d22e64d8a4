"""`make bench`: every benchmark several times, medians and ratios written to `benchmarks/results/`.

A benchmark is a module `bench_*.py` with `main(argv)`. It prints one JSON object as its last line:
`{"figures": [{"name", "unit", "value", "target"?, "peer"?, "peer_name"?}, …]}`; `peer` is what the figure is
compared with, measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

HERE = Path(__file__).parent
ONCE = ("growth",)
"""Long ones, of which one run has to do."""
RESULTS = HERE / "results"


def main() -> int:
    """Runs what was asked for (default: everything) and writes one JSON and one Markdown file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which benchmarks, without the `bench_`; default: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (default 3)")
    parser.add_argument("--database", help="ingest, lifecycle: URL of an empty PostgreSQL database")
    options = parser.parse_args()
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    if unknown := set(options.names) - set(known):
        print(
            f"no such benchmark: {', '.join(sorted(unknown))}; there are: {', '.join(known)}", file=sys.stderr
        )
        return 2
    results = {
        name: _runs(name, 1 if name in ONCE else options.runs, options.database)
        for name in options.names or known
    }
    _write(results)
    return 0


def _runs(name: str, runs: int, database: str | None) -> list[dict[str, Any]]:
    reports = []
    for number in range(runs):
        print(f"{name}: run {number + 1} of {runs}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.bench_{name}"]
        command += ["--database", database] if database else []
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True)
        reports.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return _merge(reports)


def _merge(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a figure: median, smallest and largest value, and the median ratio to the peer."""
    rows = []
    for figures in zip(*(report["figures"] for report in reports), strict=True):
        values = [figure["value"] for figure in figures]
        row = {**figures[0], "value": statistics.median(values), "min": min(values), "max": max(values)}
        if "peer" in row:
            row["peer"] = statistics.median(figure["peer"] for figure in figures)
            row["ratio"] = statistics.median(figure["value"] / figure["peer"] for figure in figures)
        rows.append(row)
    return rows


def _write(results: dict[str, list[dict[str, Any]]]) -> None:
    where = machine.describe()
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    RESULTS.mkdir(exist_ok=True)
    body = json.dumps({"measured": stamp, "machine": where, "results": results}, indent=1)
    (RESULTS / f"{stamp}.json").write_text(body + "\n")
    box = f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}"
    lines = [f"# Measured {stamp}", "", f"{box}, Python {where['python']}; {where['packages']}"]
    (RESULTS / f"{stamp}.md").write_text("\n".join([*lines, "", *_table(results)]) + "\n")
    print("\n".join(_table(results)))
    print(f"written: benchmarks/results/{stamp}.md and .json")


def _table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| benchmark | figure | median | min-max | target | peer | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for row in rows:
            peer = f"{row['peer']:,.4g} ({row['peer_name']})" if "peer" in row else ""
            ratio = f"{row['ratio']:.3g}" if "ratio" in row else ""
            spread = f"{row['min']:,.4g}-{row['max']:,.4g}"
            value = f"{row['value']:,.4g} {row['unit']}"
            cells = (name, row["name"], value, spread, str(row.get("target", "")), peer, ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
