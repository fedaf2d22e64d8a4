"""Serving never suffers from the store, and nothing captured is lost or stored twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.interceptor.engine import Engine, engine
from tests.interceptor.scripted_store import ScriptedStore

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

HELLO = [{"role": "user", "content": "hello world"}]


def ask(client: httpx.Client, running: Engine, rollout: str, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8, **more}
    return client.post(f"{running.base(rollout)}/v1/chat/completions", json=body)


def interceptor(client: httpx.Client, running: Engine) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{running.url}/agl/interceptor").json()
    return found


def test_a_store_that_is_away_is_not_noticed_by_agents_and_gets_everything_once(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    store.stop()
    try:
        times = []
        for number in range(6):
            started = time.monotonic()
            assert ask(http, running, f"away-{number}").status_code == 200
            times.append(time.monotonic() - started)
        state = interceptor(http, running)
        assert (state["store_away"], state["spool_waiting"]) == (True, 6)
        assert state["spool_bytes"] > 0
    finally:
        store.start()
    for number in range(6):
        store.wait(lambda number=number: store.calls_of(f"away-{number}"), f"the spooled call {number}")
        assert len(store.calls_of(f"away-{number}")) == 1
    # Only the first may have waited for the store.
    assert max(times[1:]) < 1.0, times
    until = time.monotonic() + 20
    while interceptor(http, running)["store_away"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    state = interceptor(http, running)
    assert (state["spool_waiting"], state["spool_bytes"], state["undurable"]) == (0, 0, 0)


def test_an_answer_that_was_lost_stores_nothing_twice(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    before = store.duplicates
    store.lose_answer = True
    assert ask(http, running, "lost").status_code == 200
    store.wait(lambda: store.duplicates > before, "the second delivery")
    assert len(store.calls_of("lost")) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
def test_an_overloaded_store_is_tried_again(
    running: Engine, store: ScriptedStore, http: httpx.Client, code: grpc.StatusCode
) -> None:
    store.fail = code
    rollout = f"overload-{code.name}"
    assert ask(http, running, rollout).status_code == 200
    assert not store.calls_of(rollout)
    store.fail = None
    store.wait(lambda: store.calls_of(rollout), "the call after the overload")


def test_the_first_byte_never_waits_and_the_last_one_does(
    running: Engine, store: ScriptedStore, http: httpx.Client
) -> None:
    ask(http, running, "warm")
    store.delay = 0.7
    try:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "ignore_eos": True, "stream": True}
        started = time.monotonic()
        with http.stream("POST", f"{running.base('slow')}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            first = time.monotonic() - started
            list(lines)
            assert store.calls_of("slow") or interceptor(http, running)["spool_waiting"]
            last = time.monotonic() - started
    finally:
        store.delay = 0.0
    assert first < 0.5 < last, (first, last)
    store.wait(lambda: store.calls_of("slow"), "the call")


def test_many_at_once_are_all_attributed(running: Engine, store: ScriptedStore) -> None:
    answers: dict[int, Any] = {}

    def agent(number: int) -> None:
        with httpx.Client(timeout=120) as client:
            stream = number % 3 == 0
            response = ask(client, running, f"many-{number}", stream=stream, n=1 + number % 2)
            answers[number] = response.status_code

    threads = [threading.Thread(target=agent, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(40), 200)
    for number in range(40):
        ((span, _),) = store.calls_of(f"many-{number}")
        assert len(span.model_call.choices) == 1 + number % 2


def test_a_spool_survives_the_engine_and_a_full_one_refuses_new_attributed_calls_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    with ScriptedStore() as own, httpx.Client(timeout=60) as client:
        own.stop()
        with engine(
            tiny_model, own.address, tmp_path, "--spool-bytes", "4000", "--ack-timeout", "0.2"
        ) as first:
            served = 0
            while (answer := ask(client, first, f"full-{served}")).status_code == 200:
                served += 1
                assert served < 50, "the spool never filled"
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "spool is full" in answer.text
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
            assert client.post(f"{first.url}/v1/chat/completions", json=body).status_code == 200
            assert served > 2
        assert any((tmp_path / "spool").glob("*.spool"))
        own.start()
        with engine(tiny_model, own.address, tmp_path):
            for number in range(served):
                own.wait(lambda number=number: own.calls_of(f"full-{number}"), f"spooled call {number}")
        assert len(own.spans) == served
        assert not any((tmp_path / "spool").glob("*.spool"))
