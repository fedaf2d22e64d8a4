"""The proofs under fire as a program: `python -m tests.chaos NAME … --count N --seed N`, or all at scale.

Each name prints its seed first and what it did at the end. `all` runs every one of them with its own count,
one after another, and writes `benchmarks/reliability/<time>.json`; `--write` does so for the ones named, and
puts their names before the time.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from tests.chaos import fuzz, kills, leases, soak, trainings, watches
from tests.runner import reliability
from tests.support.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "reliability"
_TELL_SECONDS = 5.0
_MACHINE = "tests/store/test_state_machine.py::test_the_store_keeps_to_the_model[{}]"

Row = dict[str, object]
Proof = Callable[[argparse.Namespace, int, int], Row]


def main() -> int:
    """Runs what was asked for; 0 = every promise held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("name", nargs="+", choices=(*PROOFS, "all"), help="what to run, in this order")
    parser.add_argument("--count", type=int, help="how many; default: the scale of a release")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the default counts (default 1)")
    parser.add_argument("--seed", type=int, help="seed; default: a random one, printed")
    parser.add_argument("--database", help="kills: URL of an empty database; default: an SQLite file")
    parser.add_argument("--minutes", type=float, help="fuzz: end after so long, however many there were")
    parser.add_argument("--write", action="store_true", help="write what was proven; `all` always does")
    options = parser.parse_args()
    everything = "all" in options.name
    names = list(PROOFS) if everything else options.name
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    file = stamp if everything else "-".join([*names, stamp])
    results: dict[str, Row] = {}
    for name in names:
        results[name] = _prove(name, options)
        if everything or options.write:
            # After each: a run that is cut short leaves what it has proven.
            write(file, stamp, results)
    return 0 if all(row["held"] for row in results.values()) else 1


def _prove(name: str, options: argparse.Namespace) -> Row:
    proof, default = PROOFS[name]
    count = options.count or max(1, int(default * options.scale))
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    print(f"{name}: {count:,}, seed {seed}", flush=True)
    begun = time.monotonic()
    try:
        row = {"held": True, **proof(options, count, seed)}
    except AssertionError as broken:
        print(broken, file=sys.stderr, flush=True)
        row = {"held": False, "seed": seed, "broken": str(broken)}
    row = {"count": count, **row, "seconds": round(time.monotonic() - begun, 1)}
    print(f"{name}: {json.dumps(row)}", flush=True)
    return row


def _teller(name: str, count: int) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_SECONDS:
            last = time.monotonic()
            print(f"{name}: {done:,} of {count:,}", flush=True)

    return tell


def _kills(options: argparse.Namespace, count: int, seed: int) -> Row:
    """Kills in rounds of fifty, each on a fresh database."""
    total = kills.Report(seed)
    tell = _teller("kills", count)
    for begin in range(0, count, 50):
        some, told = min(50, count - begin), functools.partial(_tell_from, tell, begin)
        total.add(asyncio.run(kills.run(seed + begin, some, options.database, tell=told)))
    return total.row()


def _fleet(_options: argparse.Namespace, count: int, seed: int) -> Row:
    """Kills of two servers over one PostgreSQL database, which crashes too; fifty for each fresh one."""
    total = kills.Report(seed)
    tell = _teller("fleet", count)
    postgres = PostgresServer()
    postgres.start()
    try:
        for begin in range(0, count, 50):
            some = min(50, count - begin)
            url = postgres.make_database()
            told = functools.partial(_tell_from, tell, begin)
            proof = kills.run(seed + begin, some, url, servers=2, crash=postgres.restart, tell=told)
            total.add(asyncio.run(proof))
    finally:
        postgres.stop()
    return total.row()


def _tell_from(tell: Callable[[int], None], begin: int, done: int) -> None:
    tell(begin + done)


def _leases(_options: argparse.Namespace, count: int, seed: int) -> Row:
    return asyncio.run(leases.run(seed, count, _teller("leases", count))).row()


def _watches(_options: argparse.Namespace, count: int, seed: int) -> Row:
    total = watches.Counts()
    tell = _teller("watches", count)
    for number in range(count):
        counts = asyncio.run(watches.run(seed + number, steps=40))
        total.messages += counts.messages
        total.names += counts.names
        total.reconnects += counts.reconnects
        tell(number + 1)
    return {"seed": seed, **vars(total)}


def _fuzz(options: argparse.Namespace, count: int, seed: int) -> Row:
    """Nonsense for every method, `count` inputs each, or as many as the time allows."""
    seconds = float("inf") if options.minutes is None else 60 * options.minutes

    async def run() -> fuzz.Result:
        async with fuzz.fuzzer(seed) as one:
            return await one.run(count, _slowly("fuzz"), seconds)

    result = asyncio.run(run())
    assert not result.defects, "\n".join(result.defects[:20])
    assert result.grown_bytes < 100 << 20, f"memory grew by {result.grown_bytes >> 20} MiB"
    done = sum(outcomes["done"] for outcomes in result.counts.values())
    total = sum(outcomes.total() for outcomes in result.counts.values())
    grown = result.grown_bytes >> 20
    return {
        "seed": seed,
        "methods": len(result.counts),
        "count": min(outcomes.total() for outcomes in result.counts.values()),
        "inputs": total,
        "carried_out": done,
        "grown_mib": grown,
    }


def _soak(_options: argparse.Namespace, count: int, seed: int) -> Row:
    """So many minutes."""
    return {"seed": seed, **soak.prove(count, _teller("soak, minutes", count))}


def _slowly(name: str) -> Callable[[str], None]:
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_SECONDS:
            last = time.monotonic()
            print(f"{name}: {text}", flush=True)

    return say


def _pytest(node: str, seed_name: str, count_name: str, _options: object, count: int, seed: int) -> Row:
    """A proof that is a test: it takes seed and count from the environment."""
    environment = {**os.environ, seed_name: str(seed), count_name: str(count)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=0",
        node,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return {"seed": seed}


def _machine(backend: str) -> Proof:
    return functools.partial(_pytest, _MACHINE.format(backend), "AGL_TEST_SEED", "AGL_TEST_EXAMPLES")


def _workers(prove: Callable[[int, int], Row], _options: object, count: int, seed: int) -> Row:
    return {"seed": seed, **prove(count, seed)}


def _trainings(prove: Callable[[int, int, trainings.Tell], Row], name: str) -> Proof:
    def run(_options: argparse.Namespace, count: int, seed: int) -> Row:
        return {"seed": seed, **prove(count, seed, _teller(name, count))}

    return run


PROOFS: dict[str, tuple[Proof, int]] = {
    "kills": (_kills, 1_000),
    "fleet": (_fleet, 200),
    "leases": (_leases, 1_000_000),
    "fuzz": (_fuzz, 100_000),
    "watches": (_watches, 500),
    "machine": (_machine("memory"), 5_000),
    "machine-file": (_machine("file"), 2_000),
    "machine-postgres": (_machine("postgres"), 1_000),
    "soak": (_soak, 30),
    "simulated-workers": (functools.partial(_workers, reliability.prove_simulated), 1_000),
    "killed-workers": (functools.partial(_workers, reliability.prove_kills), 2_000),
    "rolling-restart": (functools.partial(_workers, reliability.prove_restart), 2_000),
    "killed-hybrid": (_trainings(trainings.prove_hybrid, "killed-hybrid"), 2),
    "stopped-models": (_trainings(trainings.prove_models, "stopped-models"), 2),
    "store-away": (functools.partial(_workers, reliability.prove_store_away), 400),
}
"""By name: what runs, and how much of it for a release."""


def write(file: str, stamp: str, results: dict[str, Row]) -> None:
    """Writes what was proven at this moment, with the machine it was proven on."""
    RESULTS.mkdir(exist_ok=True)
    body = json.dumps({"measured": stamp, "machine": machine.describe(), "results": results}, indent=1)
    (RESULTS / f"{file}.json").write_text(body + "\n")
    print(f"written: benchmarks/reliability/{file}.json", flush=True)


if __name__ == "__main__":
    sys.exit(main())
