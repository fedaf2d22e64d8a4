"""The proxy as a process that is killed: what was answered is in the store, once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from agl_grpc.client import StoreClient
from agl_grpc.model import RolloutMode
from tests.interceptor.front.fake_engine import FakeEngine
from tests.interceptor.front.rig import CHAT, HELLO
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually


@contextmanager
def proxy(store: str, engine: str, spool: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A proxy process and its URL."""
    command = [sys.executable, "-m", "agl_grpc_cli", "proxy", "serve", "--port", "0", "--store", store]
    command += ["--upstream", engine, "--spool-dir", str(spool), "--drain-timeout", "2", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, process.communicate()[1]
        yield process, line.split(": ", 1)[1].split(",")[0]
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def test_a_killed_proxy_loses_nothing_and_its_heir_delivers_once(
    engine: FakeEngine, tmp_path: Path
) -> None:
    answered = 0
    with StoreProcess(tmp_path / "store.db") as server:
        async with StoreClient(server.address) as store, httpx.AsyncClient(timeout=30) as http:
            rollout = await store.start_rollout(input="task", mode=RolloutMode.TRAIN)
            path = f"/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}{CHAT}"
            with proxy(server.address, engine.url, tmp_path / "spool") as (process, url):
                for number in range(10):
                    # The first ones reach the store; those of the second half are begun while it is away.
                    if number == 5:
                        server.kill()
                    answer = await http.post(url + path, json={**HELLO, "seed": number})
                    answered += answer.status_code == 200
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            server.start()
            with proxy(server.address, engine.url, tmp_path / "spool") as (_, url):

                async def delivered() -> bool:
                    return (await http.get(f"{url}/agl/interceptor")).json()["spool_waiting"] == 0

                await eventually(delivered, what="the spool is delivered")
                spans = await store.query_spans(rollout.rollout_id)
            calls = [span for span in spans if span.model_call is not None]
    assert answered == 10
    assert len({span.span_id for span in calls}) == len(calls) == 10
    seeds = sorted(span.model_call.sampling["seed"] for span in calls if span.model_call is not None)
    assert seeds == list(range(10))


async def test_a_call_begun_while_the_store_is_away_is_announced_when_it_is_back(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with StoreProcess(tmp_path / "store.db") as server:
        async with StoreClient(server.address) as store, httpx.AsyncClient(timeout=30) as http:
            rollout = await store.start_rollout(input="task", mode=RolloutMode.TRAIN)
            path = f"/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}{CHAT}"
            with proxy(server.address, engine.url, tmp_path / "spool") as (_, url):
                server.kill()
                engine.gate.clear()
                call = asyncio.create_task(http.post(url + path, json=HELLO))
                await eventually(lambda: engine.requests, what="the call has begun")

                async def away() -> bool:
                    state = (await http.get(f"{url}/agl/interceptor")).json()
                    return bool(state["store_away"])

                await eventually(away, what="the store is away")
                server.start()

                async def back() -> bool:
                    return not await away()

                await eventually(back, what="the store is back")
                # The attempt ends meanwhile: it is not sealed before the call has ended.
                ended = await store.update_attempt(
                    rollout.rollout_id, rollout.attempt.attempt_id, "succeeded"
                )
                ids = [rollout.rollout_id]
                before = await store.wait_for_rollouts(rollout_ids=ids, timeout=0.3, until="sealed")
                engine.gate.set()
                assert (await call).status_code == 200
                sealed = await store.wait_for_rollouts(rollout_ids=ids, timeout=20, until="sealed")
                spans = await store.query_spans(rollout.rollout_id)
    assert (before, ended.open_calls) == ([], 1)
    assert [each.rollout_id for each in sealed] == [rollout.rollout_id]
    assert sum(span.model_call is not None for span in spans) == 1
