"""What capture costs in vLLM, on a tiny model, where everything else is cheap, and on one of 82 M parameters.

One engine a model and one real store; pairs of blocks of requests, one with and one without attribution,
follow each other in one life of the processes. A figure is the median over the pairs of what the captured
block of a pair has more than the other. Beside wall time stands processor time, by process: it says whose
work it is (the engine core computes logprobs and sends them, the API server receives them, records and sends,
the store keeps), and moves less when the machine is busy with something else. Without attribution the
interceptor passes calls through.

The time to the first event is taken from requests that come at random moments, at half the rate that the
engine has just kept up with, captured and others in turn at random, so that both meet the same queues. In a
block it would be a queue's: answers that end in the same step leave together once they are durable, the next
requests come all at once, and each waits for those before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import psutil

from agl_grpc.v1 import run_pb2, store_service_pb2, store_service_pb2_grpc
from benchmarks import processor
from tests.interceptor.engine import Engine, engine
from tests.support.environments import run_in_engine
from tests.support.store_process import StoreProcess

PARTS = ("engine core", "API server", "store")


class Load(NamedTuple):
    """A model and what is asked of it: requests of a block, tokens of an answer, requests at once."""

    name: str
    model: str
    requests: int
    tokens: int
    concurrency: int

    @property
    def block_tokens(self) -> int:
        return self.requests * self.tokens


LOADS = (Load("0.1 M", "tiny", 48, 128, 16), Load("82 M", "larger", 16, 64, 16))


class Block(NamedTuple):
    """One block: wall seconds, processor seconds by part."""

    seconds: float
    processor: tuple[float, ...]


class Pair(NamedTuple):
    """A captured and a plain block, and median seconds to the first event of the arrivals of each kind."""

    on: Block
    off: Block
    first_on: float
    first_off: float


class Rig(NamedTuple):
    """An engine, the base URL of an attempt on it, and the processes whose time counts, in order of PARTS."""

    running: Engine
    captured: str
    processes: tuple[psutil.Process, ...]

    def processor_seconds(self) -> list[float]:
        return [processor.seconds(process.pid) for process in self.processes]


async def ask(client: httpx.AsyncClient, base: str, tokens: int) -> float:
    """Have a streamed answer; seconds to its first event."""
    body = {
        "model": "tiny",
        "prompt": [1, *range(10, 70)],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    started = time.monotonic()
    first = 0.0
    async with client.stream("POST", f"{base}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_raw():
            first = first or time.monotonic() - started
    return first


async def run_block(rig: Rig, base: str, load: Load) -> Block:
    """Answer the block's streaming requests, as many at once as the load says."""
    gate = asyncio.Semaphore(load.concurrency)

    async def one(client: httpx.AsyncClient) -> None:
        async with gate:
            await ask(client, base, load.tokens)

    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        before = rig.processor_seconds()
        started = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(load.requests)))
        seconds = time.monotonic() - started
        used = [after - start for start, after in zip(before, rig.processor_seconds(), strict=True)]
    return Block(seconds, tuple(used))


async def run_arrivals(bases: Mapping[bool, str], load: Load, rate: float, seed: int) -> dict[bool, float]:
    """Median seconds to the first event, by kind, of requests at random moments, `rate` a second."""
    chance = random.Random(seed)
    kinds = [True, False] * load.requests
    chance.shuffle(kinds)
    running = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        for kind in kinds:
            await asyncio.sleep(chance.expovariate(rate))
            running.append(asyncio.create_task(ask(client, bases[kind], load.tokens)))
        waited = await asyncio.gather(*running)
    pairs = list(zip(kinds, waited, strict=True))
    return {kind: statistics.median(each for one, each in pairs if one is kind) for kind in bases}


async def measure(rig: Rig, load: Load, pairs: int) -> list[Pair]:
    """Pairs after one to warm up; each begins with the other kind."""
    found = []
    for number in range(pairs + 1):
        order = (True, False) if number % 2 else (False, True)
        bases = {True: rig.captured, False: rig.running.url}
        blocks = {kind: await run_block(rig, bases[kind], load) for kind in order}
        rate = 0.5 * load.requests / blocks[False].seconds
        firsts = await run_arrivals(bases, load, rate, number)
        if number:
            found.append(Pair(blocks[True], blocks[False], firsts[True], firsts[False]))
    return found


@contextlib.contextmanager
def rig_of(folder: Path, load: Load) -> Iterator[Rig]:
    """Make the model, start engine and store, and a rollout that the captured calls belong to."""
    run_in_engine("tests.support.tiny_model", str(folder / "model"), load.model)
    with (
        StoreProcess(folder / "store.db") as server,
        engine(folder / "model", server.address, folder) as running,
        grpc.insecure_channel(server.address) as channel,
    ):
        store: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="run-1")))
        started = store.StartRollout(store_service_pb2.StartRolloutRequest(run_id="run-1")).rollout
        assert server.process is not None
        api = psutil.Process(running.process.pid)
        core = next(child for child in api.children(recursive=True) if "EngineCor" in child.name())
        base = running.base(started.rollout.rollout_id, started.attempt.attempt_id)
        yield Rig(running, base, (core, api, psutil.Process(server.process.pid)))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks of each model")
    parser.add_argument("--model", choices=[load.name for load in LOADS], help="only this one")
    options = parser.parse_args(argv)
    figures: list[dict[str, object]] = []
    for load in LOADS:
        if options.model not in (None, load.name):
            continue
        with tempfile.TemporaryDirectory() as name, rig_of(Path(name), load) as rig:
            pairs = asyncio.run(measure(rig, load, options.pairs))
            state = httpx.get(f"{rig.running.url}/agl/interceptor").json()
        expected = 2 * (options.pairs + 1) * load.requests
        if state["delivered"] + state["respooled"] != expected or state["rejected"]:
            print(f"not everything reached the store: {state}, expected {expected}", file=sys.stderr)
            return 1
        figures += figures_of(load, pairs)
    print(json.dumps({"figures": figures}))
    return 0


def figures_of(load: Load, pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """Medians over the pairs."""

    def median(of: Callable[[Block, Block], float]) -> float:
        return statistics.median(of(pair.on, pair.off) for pair in pairs)

    def row(name: str, unit: str, value: float, **more: object) -> dict[str, object]:
        return {"name": f"{load.name}: {name}", "unit": unit, "value": value, **more}

    micro = 1e6 / load.block_tokens
    unit = "µs of processor a token"
    wall = median(lambda on, off: off.seconds / on.seconds)
    work = median(lambda on, off: sum(off.processor) / sum(on.processor))
    first = statistics.median(1e3 * (pair.first_on - pair.first_off) for pair in pairs)
    rows = [
        row("throughput, captured to not", "of 1", wall, target=">= 0.97"),
        row("throughput by processor time", "of 1", work, target=">= 0.97"),
        row("not captured", "tokens/s", load.block_tokens / median(lambda _, off: off.seconds)),
        row("first event, added", "ms", first, target="<= 0.5"),
        row("not captured, all parts", unit, median(lambda _, off: micro * sum(off.processor))),
    ]
    for index, part in enumerate(PARTS):
        used = [micro * (pair.on.processor[index] - pair.off.processor[index]) for pair in pairs]
        rows.append(row(f"{part}, added", unit, statistics.median(used)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
