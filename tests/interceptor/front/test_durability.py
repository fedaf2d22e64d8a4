"""Durable before the last byte, whatever the store does; delivered once when it is back."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import grpc
import pytest

from agl_grpc.interceptor.capture.spool import Spool, SpoolInUse
from tests.interceptor.front.fake_engine import FakeEngine
from tests.interceptor.front.rig import proxy_before
from tests.interceptor.front.test_capture import recorded
from tests.interceptor.scripted_store import ScriptedStore
from tests.support.waiting import eventually


async def test_a_store_that_is_away_is_not_noticed_and_gets_everything_once(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    scripted.stop()
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        for number in range(5):
            assert (await rig.chat(rig.base(f"ro-{number}"), stream=number % 2 == 0)).status_code == 200
        await eventually(lambda: rig.state()["store_away"], what="the store is away")
        assert rig.state()["spool_waiting"] == 5
        started = time.monotonic()
        assert (await rig.chat(rig.base("ro-5"))).status_code == 200
        assert time.monotonic() - started < 1.0
        scripted.start()
        for number in range(6):
            await recorded(scripted, f"ro-{number}")
        await eventually(lambda: not rig.state()["store_away"], what="the store is back")
        assert rig.state()["spool_waiting"] == rig.state()["undurable"] == 0
    assert scripted.duplicates == 0
    assert not scripted.open_calls


async def test_the_record_is_on_disk_before_the_last_byte(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    scripted.stop()
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        for stream in (False, True):
            assert (await rig.chat(stream=stream)).status_code == 200
        (segment,) = (tmp_path / "spool").glob("*.spool")
        on_disk = segment.read_bytes()
    assert on_disk.count(b"at-1") == 2
    # The next process finds and delivers them.
    scripted.start()
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        await recorded(scripted, count=2)
        await eventually(lambda: not rig.state()["spool_waiting"], what="the spool is empty")
    assert not list((tmp_path / "spool").glob("*.spool"))


async def test_a_call_is_announced_before_its_last_byte_and_the_first_byte_waits_for_nothing(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        await rig.chat()  # the store has been asked about the attempt
        await recorded(scripted)
        scripted.delay = 0.4
        started = time.monotonic()
        async with rig.http.stream("POST", rig.base() + "/v1/chat/completions", json={
            "model": "tiny", "messages": [], "stream": True,
        }) as answer:  # fmt: skip
            chunks = answer.aiter_raw()
            data = await anext(chunks)
            first = time.monotonic() - started
            async for chunk in chunks:
                data += chunk
            last = time.monotonic() - started
        assert first < 0.3
        assert last > 0.3
        assert b"[DONE]" in data
        announced = [
            call for request in scripted.requests for group in request.groups for call in group.open_calls
        ]
        assert len(announced) == 2
        scripted.delay = 0.0
        await recorded(scripted, count=2)
    assert not scripted.open_calls


async def test_an_answer_that_is_lost_and_an_overload_store_nothing_twice(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        scripted.lose_answer = True
        await rig.chat()
        await recorded(scripted)
        await eventually(lambda: scripted.duplicates, what="the second delivery")
        scripted.fail = grpc.StatusCode.RESOURCE_EXHAUSTED
        await rig.chat(rig.base("ro-2"))
        await eventually(lambda: rig.state()["store_away"], what="the overload is noticed")
        scripted.fail = None
        await recorded(scripted, "ro-2")
    assert len(scripted.calls_of("ro-1")) == 1


async def test_a_full_spool_refuses_new_attributed_calls_only(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    scripted.stop()
    async with proxy_before(scripted.address, tmp_path, engine, spool_bytes=1500, keep_raw=False) as rig:
        served = 0
        while (answer := await rig.chat(rig.base(f"ro-{served}"))).status_code == 200:
            served += 1
            assert served < 50
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "spool_full")
        assert int(answer.headers["retry-after"]) > 0
        assert (await rig.chat(rig.proxy.url)).status_code == 200
        scripted.start()
        for number in range(served):
            await recorded(scripted, f"ro-{number}")

        async def accepted() -> bool:
            return (await rig.chat(rig.base("ro-again"))).status_code == 200

        await eventually(accepted, what="new calls are taken again")


async def test_a_base_that_the_store_lost_is_sent_whole(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine) as rig:
        body = {"prompt": list(range(40))}

        async def ask(count: int) -> None:
            await rig.http.post(rig.base() + "/v1/completions", json={"model": "tiny", **body})
            await recorded(scripted, count=count)
            await eventually(lambda: not rig.state()["spool_waiting"], what="delivery")

        async def long_prompt(request: object, asked: dict[str, object]) -> object:
            from aiohttp import web

            from tests.interceptor.front.fake_engine import answer_of

            answer = answer_of("/v1/completions", asked)
            answer["choices"][0]["prompt_token_ids"] = list(range(40))
            return web.json_response(answer)

        engine.script = long_prompt  # type: ignore[assignment]  # a plain function will do
        await ask(1)
        scripted.forgetful = True
        await ask(2)
        scripted.forgetful = False
        assert rig.state()["rejected"] == 0
    assert [prompt for _, prompt in scripted.calls_of("ro-1")] == [list(range(40))] * 2


async def test_a_stopping_proxy_lets_running_answers_end(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    engine.gate.clear()
    async with proxy_before(scripted.address, tmp_path, engine, drain_timeout=10.0) as rig:
        call = asyncio.create_task(rig.chat())
        await eventually(lambda: engine.requests, what="the request")
        stopping = asyncio.create_task(rig.proxy.stop())
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await call).status_code == 200
        await stopping
    assert len(scripted.calls_of("ro-1")) == 1


async def test_two_proxies_cannot_share_a_spool(
    scripted: ScriptedStore, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(scripted.address, tmp_path, engine):
        with pytest.raises(SpoolInUse, match="give each engine its own"):
            async with proxy_before(scripted.address, tmp_path, engine):
                pass


async def test_a_spool_that_is_reused_keeps_its_records_and_its_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**6, reuse=True)
    for number in range(3):
        entry = await spool.append(b"record %d" % number, note=number)
        assert (entry.note, spool.read(entry)) == (number, b"record %d" % number)
        spool.drop(1)
        assert spool.size == 0
    assert len(os.listdir(tmp_path)) == 2  # one file and the lock
    waiting = [b"waiting", b"longer than what was delivered"]
    for record in waiting:
        await spool.append(record)
    await spool.close()
    again = Spool(tmp_path, 10**6)
    # They lie over what was delivered, of which nothing comes again.
    assert [again.read(entry) for entry in again.peek(10, 10**6)] == waiting
    assert [entry.note for entry in again.peek(10, 10**6)] == [None] * 2
    assert again.damaged == 0
    await again.close()


def damage(folder: Path, position: int) -> None:
    (path,) = folder.glob("*.spool")
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


async def test_a_spool_that_is_reused_loses_a_torn_record_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**6, reuse=True)
    await spool.append(b"delivered, and longer than each that follows")
    spool.drop(1)
    entries = [await spool.append(b"record %d" % number) for number in range(2)]
    await spool.close()
    damage(tmp_path, entries[1].position)
    again = Spool(tmp_path, 10**6, reuse=True)
    assert [again.read(entry) for entry in again.peek(10, 10**6)] == [b"record 0"]
    assert again.damaged == 1
    await again.close()
