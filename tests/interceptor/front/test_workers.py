"""A proxy of several processes is one proxy: whoever accepts a connection, each rollout has one keeper."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.interceptor.capture.spool import Spool, SpoolInUse, gather, hold
from agl_grpc.interceptor.front.peers import key_of
from agl_grpc.model import AttemptedRollout, RolloutMode
from tests.interceptor.front.fake_engine import FakeEngine
from tests.interceptor.front.rig import CHAT, HELLO
from tests.interceptor.front.test_killed import proxy
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

ROLLOUTS = 16


def path_of(rollout: AttemptedRollout) -> str:
    return f"/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}{CHAT}"


async def start_rollouts(store: StoreClient) -> list[AttemptedRollout]:
    return [await store.start_rollout(input="task", mode=RolloutMode.TRAIN) for _ in range(ROLLOUTS)]


async def state_of(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get(f"{url}/agl/interceptor")).json()
    return found


async def calls_of(store: StoreClient, rollout: AttemptedRollout) -> list[Any]:
    return [span for span in await store.query_spans(rollout.rollout_id) if span.model_call is not None]


async def ask_on_new_connection(url: str, rollout: AttemptedRollout, tries: int = 0) -> int:
    headers = {"x-stainless-retry-count": str(tries)}
    async with httpx.AsyncClient(timeout=30) as http:
        return (await http.post(url + path_of(rollout), json=HELLO, headers=headers)).status_code


async def test_several_processes_keep_one_account_of_each_rollout(engine: FakeEngine, tmp_path: Path) -> None:
    options = ("--workers", "3", "--max-calls", "4")
    with StoreProcess(tmp_path / "store.db") as server:
        async with StoreClient(server.address) as store, httpx.AsyncClient(timeout=30) as http:
            rollouts = await start_rollouts(store)
            with proxy(server.address, engine.url, tmp_path / "spool", *options) as (_, url):
                # Connections that carry one rollout after the other, as those of a pool do, and a body that
                # comes in many pieces.
                large = {"model": "tiny", "messages": [{"role": "user", "content": "long " * 100_000}]}
                for body in (HELLO, large):
                    answers = await asyncio.gather(
                        *(http.post(url + path_of(rollout), json=body) for rollout in rollouts)
                    )
                    assert {answer.status_code for answer in answers} == {200}
                # Each of these is a connection of its own, accepted by any of them.
                for expected, tries in ((200, 0), (200, 1), (429, 0)):
                    codes = [await ask_on_new_connection(url, each, tries) for each in rollouts]
                    assert set(codes) == {expected}
                await eventually(
                    lambda: _delivered(http, url, 5 * ROLLOUTS),
                    what="all calls and refusals are in the store",
                )
                state = await state_of(http, url)
            found = [await calls_of(store, rollout) for rollout in rollouts]
    assert len(state["workers"]) == 3
    assert all(worker["captured"] for worker in state["workers"])
    assert sum(worker["captured"] for worker in state["workers"]) == state["captured"] == 4 * ROLLOUTS
    assert state["handed_over"] > 0
    assert state["retries"] == ROLLOUTS
    assert state["refusals"] == {"rollout_limit": ROLLOUTS}
    assert [len(calls) for calls in found] == [5] * ROLLOUTS
    assert len({span.span_id for calls in found for span in calls}) == 5 * ROLLOUTS


async def _delivered(http: httpx.AsyncClient, url: str, calls: int) -> bool:
    state = await state_of(http, url)
    return state["delivered"] >= calls and not state["spool_waiting"]


async def test_a_killed_process_is_replaced_and_nothing_is_lost_or_stored_twice(
    engine: FakeEngine, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    with StoreProcess(tmp_path / "store.db") as server:
        async with StoreClient(server.address) as store, httpx.AsyncClient(timeout=30) as http:
            rollouts = await start_rollouts(store)
            with proxy(server.address, engine.url, spool, "--workers", "2") as (process, url):
                server.kill()
                for rollout in rollouts:
                    assert await ask_on_new_connection(url, rollout) == 200
                killed = (await state_of(http, url))["workers"][0]["pid"]
                os.kill(killed, signal.SIGKILL)

                async def replaced() -> bool:
                    try:
                        workers = (await state_of(http, url))["workers"]
                    except httpx.TransportError:  # the connection was the dead one's
                        return False
                    return len(workers) == 2 and killed not in {worker["pid"] for worker in workers}

                await eventually(replaced, what="another process in its place")
                assert {await ask_on_new_connection(url, rollout) for rollout in rollouts} == {200}
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
                # They do not outlive the one that started them.
                await asyncio.to_thread(psutil.wait_procs, children, 30)
                assert not [child for child in children if child.is_running()]
            server.start()
            # One process delivers what two have left.
            with proxy(server.address, engine.url, spool) as (_, url):
                await eventually(lambda: _delivered(http, url, 1), what="the spool is delivered")
                found = [await calls_of(store, rollout) for rollout in rollouts]
    assert [len(calls) for calls in found] == [2] * ROLLOUTS
    assert len({span.span_id for calls in found for span in calls}) == 2 * ROLLOUTS


async def test_spools_of_fewer_processes_are_gathered_in_order(tmp_path: Path) -> None:
    for number, folder in enumerate((tmp_path, *(tmp_path / f"worker-{n}" for n in range(3)))):
        spool = Spool(folder, 10_000)
        await spool.append(b"%d" % number)
        await spool.close()
    with hold(tmp_path):
        with pytest.raises(SpoolInUse):
            Spool(tmp_path, 10_000)
        with hold(tmp_path / "worker-2"), pytest.raises(SpoolInUse):
            gather(tmp_path, 2)
        gather(tmp_path, 2)
    found = {}
    for number in range(2):
        spool = Spool(tmp_path / f"worker-{number}", 10_000)
        found[number] = [spool.read(entry) for entry in spool.peek(10, 1000)]
        await spool.close()
    assert found == {0: [b"1", b"0", b"3"], 1: [b"2"]}


def test_whose_state_a_request_needs() -> None:
    claims = "WyJydW4iLCJyMiIsImEyIiwxXQ"  # ["run","r2","a2",1]
    assert key_of(f"/rollout/r%201/attempt/a{CHAT}?x=1", {}) == "r 1"
    assert key_of(CHAT, {"authorization": f"Bearer agl1.{claims}.c2ln", "x-rollout-id": "r"}) == "r2"
    assert key_of(CHAT, {"x-rollout-id": "r", "x-attempt-id": "a"}) == "r"
    assert key_of(CHAT, {"x-agl-session": "s"}) == "s"
    assert key_of("/health", {}) == ""
