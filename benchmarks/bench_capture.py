"""What capture costs in vLLM: tokens a second and time to the first token, captured against not captured.

One engine on the tiny model and one real store; blocks of requests with and without attribution alternate, so
that both see the same machine. Without attribution the interceptor passes calls through.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx

from agl_grpc.v1 import run_pb2, store_service_pb2, store_service_pb2_grpc
from tests.interceptor.engine import Engine, engine
from tests.support.environments import run_in_engine
from tests.support.store_process import StoreProcess


class Block(NamedTuple):
    """One block of requests: tokens a second of the whole, median seconds to the first event."""

    tokens_per_second: float
    first_event: float


async def run_block(running: Engine, base: str, requests: int, tokens: int, concurrency: int) -> Block:
    """Answer `requests` streaming requests of `tokens` tokens, at most `concurrency` at once."""
    gate = asyncio.Semaphore(concurrency)
    firsts: list[float] = []
    body = {
        "model": "tiny",
        "prompt": [1, *range(10, 70)],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }

    async def one(client: httpx.AsyncClient) -> None:
        async with gate:
            started = time.monotonic()
            async with client.stream("POST", f"{base}/v1/completions", json=body) as response:
                response.raise_for_status()
                seen = False
                async for _ in response.aiter_raw():
                    if not seen:
                        firsts.append(time.monotonic() - started)
                        seen = True

    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        started = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(requests)))
        seconds = time.monotonic() - started
    return Block(requests * tokens / seconds, statistics.median(firsts))


async def measure(
    running: Engine, captured: str, options: argparse.Namespace
) -> tuple[list[Block], list[Block]]:
    """Alternating blocks, after one of each to warm up: captured ones, then plain ones."""
    on: list[Block] = []
    off: list[Block] = []
    for number in range(2 * options.blocks + 2):
        # Each pair begins with the other kind, so that neither always comes first.
        kind = (number + number // 2) % 2
        base = captured if kind else running.url
        block = await run_block(running, base, options.requests, options.tokens, options.concurrency)
        if number >= 2:
            (on if kind else off).append(block)
    return on, off


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6, help="blocks of each kind")
    parser.add_argument("--requests", type=int, default=48, help="requests of a block")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_in_engine("tests.support.tiny_model", str(folder / "tiny"))
        with (
            StoreProcess(folder / "store.db") as server,
            engine(folder / "tiny", server.address, folder) as running,
            grpc.insecure_channel(server.address) as channel,
        ):
            store = store_service_pb2_grpc.StoreServiceStub(channel)
            store.CreateRun(store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id="run-1")))
            started = store.StartRollout(store_service_pb2.StartRolloutRequest(run_id="run-1"))
            rollout = started.rollout.rollout.rollout_id
            base = running.base(rollout, started.rollout.attempt.attempt_id)
            on, off = asyncio.run(measure(running, base, options))
            state = httpx.get(f"{running.url}/agl/interceptor").json()
    expected = (options.blocks + 1) * options.requests
    if state["delivered"] + state["respooled"] != expected or state["rejected"]:
        print(f"not everything reached the store: {state}, expected {expected}", file=sys.stderr)
        return 1
    print(json.dumps({"figures": figures(on, off)}))
    return 0


def figures(on: Sequence[Block], off: Sequence[Block]) -> list[dict[str, object]]:
    """Medians over blocks, each beside that of the uncaptured blocks."""

    def row(name: str, unit: str, target: str, field: int, scale: float) -> dict[str, object]:
        return {
            "name": name,
            "unit": unit,
            "value": scale * statistics.median(block[field] for block in on),
            "target": target,
            "peer": scale * statistics.median(block[field] for block in off),
            "peer_name": "not captured",
        }

    return [
        row("throughput, captured", "tokens/s", "ratio >= 0.95", 0, 1.0),
        row("first event, captured", "ms", "peer + 0.5", 1, 1e3),
    ]


if __name__ == "__main__":
    sys.exit(main())
