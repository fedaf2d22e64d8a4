"""The sync face, and clients of a store that is killed and comes back; the store is a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.client import (
    Completion,
    Delivered,
    LeaseStream,
    RetryPolicy,
    SpanGroup,
    SpanStreamer,
    StoreClient,
    StoreUnavailable,
    SyncStoreClient,
    io_thread,
)
from agl_grpc.model import EnqueueRolloutRequest, RolloutStatus, Span
from tests.support.postgres import PostgresServer
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually


@pytest.fixture(scope="module", params=["file", "postgres"])
def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreProcess]:
    folder = tmp_path_factory.mktemp("store")
    database: Path | str = folder / "agl.db"
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        database = server.make_database()
    with StoreProcess(database, log=folder / "agl.log") as running:
        yield running


def _use_in_child(client: SyncStoreClient, answers: Any) -> None:
    try:
        client.get_rollout_by_id("x")
        answers.put("worked")
    except RuntimeError as error:
        answers.put(f"{type(error).__name__}: {error}")


def _count_rollouts(client: SyncStoreClient, answers: Any) -> None:
    answers.put(len(client.query_rollouts()))
    client.close()


def test_blocking_calls_from_many_threads_and_processes(process: StoreProcess) -> None:
    with SyncStoreClient(process.address) as client:
        ids: list[str] = []

        def work() -> None:
            for _ in range(10):
                rollout = client.start_rollout({"a": 1})
                client.update_attempt(rollout.rollout_id, "latest", status="succeeded")
                ids.append(rollout.rollout_id)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = client.wait_for_rollouts(rollout_ids=ids, timeout=10)
        assert {rollout.status for rollout in done} == {RolloutStatus.SUCCEEDED}
        assert len(done) == 40
        changes = client.watch_rollouts(include_existing=True)
        seen: set[str] = set()
        while len(seen) < 40:
            seen |= {rollout.rollout_id for rollout in next(changes).items}
        changes.close()  # type: ignore[attr-defined]  # a generator, typed as the iterator that users see
        assert client.get_rollout_by_id("unknown") is None
        with pytest.raises(ValueError, match="does not exist"):
            client.start_attempt("unknown")

        assert pickle.loads(pickle.dumps(client)).async_client.target == process.address
        spawn = multiprocessing.get_context("spawn")
        answers = spawn.Queue()
        child = spawn.Process(target=_count_rollouts, args=(client, answers))
        child.start()
        assert answers.get(timeout=30) == 40
        child.join(10)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # what is tested
def test_a_forked_child_is_told_to_make_its_own_client(process: StoreProcess) -> None:
    with SyncStoreClient(process.address) as client:
        client.statistics()
        fork = multiprocessing.get_context("fork")
        answers = fork.Queue()
        child = fork.Process(target=_use_in_child, args=(client, answers))
        child.start()
        answer = answers.get(timeout=30)
        child.join(10)
    assert answer.startswith(
        "ForkedProcess: a client of the parent process was used after fork; make clients in"
    )


def test_the_io_thread_never_waits_for_itself() -> None:
    async def wait_for_itself() -> None:
        io_thread().run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="would wait for itself"):
        io_thread().run(wait_for_itself())


def test_a_store_that_is_away_is_a_clear_error(nowhere: str) -> None:
    with (
        SyncStoreClient(nowhere, retry=RetryPolicy(timeout=0.2)) as client,
        pytest.raises(StoreUnavailable, match="cannot be reached"),
    ):
        client.statistics()


async def test_everything_goes_on_after_kill_and_restart(process: StoreProcess) -> None:
    """Calls, a span stream, a lease stream and a watch live through two kill -9 of the store."""
    async with StoreClient(process.address) as client:
        made = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(60)])
        ids = [rollout.rollout_id for rollout in made]
        finished: list[str] = []
        watched: set[str] = set()
        sent: list[str] = []
        streamer = SpanStreamer(client).start()

        async def watch() -> None:
            async for change in client.watch_rollouts(include_existing=True):
                watched.update(r.rollout_id for r in change.items if r.status.is_terminal)

        async def serve(stream: LeaseStream) -> None:
            async for event in stream:
                if isinstance(event, Delivered):
                    lease = event.work.lease
                    span = Span.from_attributes(attributes={}, name="work")
                    group = SpanGroup(rollout_id=lease.rollout_id, attempt_id=lease.attempt_id, spans=[span])
                    assert (await streamer.send(group)).rejected == ()
                    sent.append(span.span_id)
                    await stream.complete(Completion(lease=lease))
                    finished.append(lease.rollout_id)
                    stream.grant(1)

        async def kill_twice() -> None:
            for mark in (15, 35):
                await eventually(lambda: len(finished) >= mark, within=30, what=f"{mark} finished")  # noqa: B023  # awaited at once
                process.kill()
                await asyncio.to_thread(process.start)

        async with LeaseStream(client, worker_id="w", credits=1) as stream:
            tasks = [asyncio.create_task(serve(stream)), asyncio.create_task(watch())]
            await kill_twice()
            done = await client.wait_for_rollouts(rollout_ids=ids, timeout=60)
            assert len(done) == 60
            assert {rollout.status for rollout in done} == {RolloutStatus.SUCCEEDED}
            await eventually(lambda: watched >= set(ids), within=20, what="every end watched")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await streamer.close()
        stored = [span.span_id for r in ids for span in await client.query_spans(r)]
        assert len(stored) == len(set(stored))
        assert set(sent) <= set(stored)
