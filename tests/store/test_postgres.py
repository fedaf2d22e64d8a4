"""What only PostgreSQL can do to a store: it goes away, it is not ours, it refuses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from urllib.parse import quote

import grpc
import psycopg
import pytest

from agl_grpc.store.clock import ManualClock
from agl_grpc.store.errors import StoreError
from agl_grpc.store.storage.database import open_database
from agl_grpc.store.storage.engine import Connection, DatabaseError
from agl_grpc.store.storage.postgres import locks
from agl_grpc.store.storage.postgres.clock import DatabaseClock
from agl_grpc.store.storage.postgres.connection import PostgresConnection, connect
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.store.verify.files import verify_postgres
from agl_grpc.v1 import error_reason_pb2, event_pb2, span_pb2, store_service_pb2
from tests.store.rig import Rig, error_info, reason, running, seconds
from tests.store.span_support import append, call_span, span
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually, free_port


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database without rows."""
    with postgres.lend() as lent:
        yield lent


async def enqueued(rig: Rig, rollout_id: str) -> bool:
    """Whether a rollout was taken; else the store must have said that its database is away."""
    try:
        await rig.enqueue(rollout_id=rollout_id)
    except grpc.aio.AioRpcError as error:
        refusal = reason(error)
    else:
        return True
    assert refusal == "STORAGE_AWAY"
    return False


async def test_a_database_that_goes_away_is_waited_for() -> None:
    """Calls are refused meanwhile, with RetryInfo; then everything goes on by itself, watches included."""
    server = PostgresServer()
    server.start()
    try:
        async with running(server.make_database(), DatabaseClock()) as rig:
            await rig.enqueue(rollout_id="before")
            (leased,) = await rig.lease(lease_duration=seconds(30))
            server.crash()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.enqueue(rollout_id="meanwhile")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason(caught.value) == "STORAGE_AWAY"
            assert error_info(caught.value).domain == "agl-grpc"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.rollout("before")
            assert reason(caught.value) == "STORAGE_AWAY"
            server.start()

            await eventually(lambda: enqueued(rig, "after"), within=20, what="the store connects again")
            (done,) = await rig.complete(leased)
            assert not done.HasField("error"), "what was acknowledged before is there"
            assert not done.rollout.sealed, "who was refused meanwhile may hold calls of it"
            assert await rig.status("before") == "succeeded"
            (other,) = await rig.lease()
            assert other.rollout.rollout_id == "after"
    finally:
        server.stop()


async def test_a_connection_that_breaks_is_replaced(url: str) -> None:
    async with running(url, DatabaseClock()) as rig:
        await rig.enqueue(rollout_id="a")
        (leased,) = await rig.lease()
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert await rig.status("a") == "preparing", "a read is asked again on a new connection"
        await eventually(lambda: enqueued(rig, "b"), what="the writer connects again")
        answer = await rig.store.ListRollouts(store_service_pb2.ListRolloutsRequest())
        assert [one.rollout.rollout_id for one in answer.rollouts] == ["a", "b"]
        (done,) = await rig.complete(leased)
        assert not done.HasField("error")
        assert not done.rollout.sealed, "who was refused meanwhile may hold calls of it"


async def test_leases_outlive_a_time_without_any_server(url: str) -> None:
    """R9: nobody could renew while the database was away, so nobody loses a lease by it."""
    async with running(url, DatabaseClock()) as rig:
        await rig.enqueue(rollout_id="r")
        (leased,) = await rig.lease(lease_duration=seconds(30))

        # As if no server had written for a minute: the next group finds that, and extends first. All at once:
        # the store's own timers must not see the one without the other.
        with psycopg.connect(url) as operator:
            operator.execute(locks.WRITE)
            operator.execute("UPDATE counters SET beat = beat - 60000000")
            now = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
            operator.execute(f"UPDATE attempts SET lease_expire_time = {now}, due = {now}")
        await rig.server.store.timers.fire()
        (done,) = await rig.complete(leased)
        assert not done.HasField("error")


async def test_a_slow_machine_extends_no_lease_of_a_clock_that_a_test_moves(url: str) -> None:
    """Else a test that gets no processor for 5 s sees leases live on that its own clock has ended."""
    async with running(url, ManualClock()) as rig:
        await rig.enqueue(rollout_id="r", config={"max_redeliveries": 1})
        await rig.lease(lease_duration=seconds(30))
        with psycopg.connect(url) as operator:
            operator.execute("UPDATE counters SET beat = beat - 60000000")
        assert isinstance(rig.clock, ManualClock)
        rig.clock.advance(31)
        await rig.server.store.timers.fire()
        assert await rig.status("r") == "requeuing"


async def test_a_group_that_others_are_in_the_way_of_runs_again(url: str) -> None:
    """A deadlock with another program's transaction: PostgreSQL ends one of the two, the store repeats it."""
    store = await Store.open(url, clock=ManualClock())
    try:
        for name in ("a", "b"):
            await store.write(lambda tx, name=name: tx.execute("INSERT INTO meta VALUES (?, '0')", (name,)))
        foreign = await asyncio.to_thread(psycopg.connect, url)
        foreign.execute("SET deadlock_timeout = '1min'")
        foreign.execute("UPDATE meta SET value = '1' WHERE name = 'b'")
        runs = 0
        crossed: list[asyncio.Future[object]] = []
        loop = asyncio.get_running_loop()

        def run(tx: Tx) -> None:
            nonlocal runs
            runs += 1
            tx.event(1, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_UPDATED, runs)
            tx.execute("UPDATE meta SET value = '2' WHERE name = 'a'")
            if runs == 1:
                loop.call_soon_threadsafe(cross)
            tx.execute("UPDATE meta SET value = '2' WHERE name = 'b'")

        def cross() -> None:
            crossed.append(loop.run_in_executor(None, _cross, foreign))

        await store.write(run)
        assert runs > 1
        await crossed[0]
        rows = await store.read(lambda db: db.execute("SELECT ref FROM events").fetchall())
        assert rows == [(runs,)], "what the first run had written is undone"
    finally:
        await store.close()


def _cross(foreign: psycopg.Connection[tuple[object, ...]]) -> None:
    with foreign:
        foreign.execute("UPDATE meta SET value = '1' WHERE name = 'a'")


async def test_spans_whose_transaction_runs_again_are_refused_once(url: str) -> None:
    """What is refused of a message is told once, however often PostgreSQL breaks its transaction off."""
    async with running(url, DatabaseClock()) as rig:
        await rig.enqueue(rollout_id="r")
        (leased,) = await rig.lease()
        names = {"rollout_id": leased.attempt.rollout_id, "attempt_id": leased.attempt.attempt_id}
        lost = call_span([1, 2], [3], base=b"unknown!", base_length=1)
        groups = [
            span_pb2.AttemptSpans(**names, spans=[span("kept"), lost, span("bad", span_id=bytes(8))]),
            span_pb2.AttemptSpans(**{**names, "rollout_id": "other"}, spans=[span("misplaced")]),
        ]
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute(_FAILS_TWICE)
            answer = await append(rig.store, *groups)
            assert operator.execute("SELECT last_value FROM failures").fetchone() == (3,)
            operator.execute("DROP FUNCTION fails CASCADE; DROP SEQUENCE failures")
        assert (answer.stored, list(answer.sequence_ids)) == (1, [1, 0, 0, 0])
        assert [(one.group_index, one.index) for one in answer.rejected] == [(0, 2), (0, 1), (1, -1)]
        assert answer.rejected[1].status.reason == error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN
        stored = await rig.store.ListSpans(store_service_pb2.ListSpansRequest(rollout_id="r"))
        assert [one.span.name for one in stored.spans] == ["kept"]


# A sequence counts on when its transaction is undone.
_FAILS_TWICE = """
CREATE SEQUENCE failures;
CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('failures') < 3 THEN RAISE EXCEPTION 'in the way' USING ERRCODE = '40001'; END IF;
    RETURN new;
END $$;
CREATE TRIGGER fails BEFORE INSERT ON span_sequences FOR EACH ROW EXECUTE FUNCTION fails();
"""


async def test_text_that_the_database_cannot_hold_is_refused(url: str) -> None:
    async with running(url) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.enqueue(queue="a\0b")
        assert reason(caught.value) == "INVALID_FIELD"
        assert "NUL" in (caught.value.details() or "")
        await rig.enqueue(queue="a")


def test_a_newer_database_is_refused_with_both_versions(postgres: PostgresServer) -> None:
    url = postgres.make_database()
    open_database(url).close()
    with psycopg.connect(url) as newer:
        newer.execute("UPDATE schema_families SET version = 99 WHERE name = 'core'")
    with pytest.raises(DatabaseError, match=r"newer server.*'core' have version 99, this server knows \d"):
        open_database(url)


def test_tables_of_another_program_are_refused(postgres: PostgresServer) -> None:
    url = postgres.make_database()
    with psycopg.connect(url) as foreign:
        foreign.execute("CREATE TABLE runs (id serial)")
    with pytest.raises(DatabaseError, match=r"tables of another program .*runs"):
        open_database(url)


def test_a_server_without_its_database_says_why_in_one_line(postgres: PostgresServer) -> None:
    nowhere = f"postgresql://user:secret@127.0.0.1:{free_port()}/db"
    command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", "0", "--database", nowhere]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("agl-grpc store: database postgresql://user@127.0.0.1:"), line
    assert "secret" not in line
    for url, why in ((postgres.url("missing"), "does not exist"), ("postgresql://[broken", "unreadable URL")):
        with pytest.raises(DatabaseError, match=why) as caught:
            open_database(url)
        assert "\n" not in str(caught.value)


async def test_durability_is_what_acknowledgements_say(postgres: PostgresServer) -> None:
    """A database whose default is to answer before the disk has it does not set the tone."""
    options = quote("-csynchronous_commit=off")
    with postgres.lend() as lent:
        store = await Store.open(f"{lent}?options={options}", clock=ManualClock())
        try:
            rows = await store.write(lambda tx: tx.execute("SHOW synchronous_commit").fetchall())
            assert rows == [("on",)]
        finally:
            await store.close()


async def test_a_store_error_leaves_the_group_usable(url: str) -> None:
    """A statement that fails aborts PostgreSQL's transaction; the neighbours in the group must not notice."""
    store = await Store.open(url, clock=ManualClock())

    def broken(tx: Tx) -> None:
        tx.execute("INSERT INTO meta VALUES ('half', '1')")
        tx.execute("SELECT no_such_column FROM meta")

    def reads_wrongly(tx: Tx) -> None:
        tx.execute("SELECT no_such_column FROM meta")

    try:
        results = await asyncio.gather(
            store.write(lambda tx: tx.execute("INSERT INTO meta VALUES ('first', '1')").rowcount),
            store.write(broken),
            store.write(reads_wrongly),
            store.write(lambda tx: tx.execute("INSERT INTO meta VALUES ('last', '1')").rowcount),
            return_exceptions=True,
        )
        assert [results[0], results[3]] == [1, 1]
        assert all(isinstance(one, StoreError) and one.reason_name == "INTERNAL" for one in results[1:3])
        found = await store.read(lambda db: {name for (name,) in db.execute("SELECT name FROM meta")})
        assert {"first", "last"} <= found
        assert "half" not in found
    finally:
        await store.close()


def test_the_driver_is_asked_for_by_its_extra(tmp_path: Path) -> None:
    """Without psycopg a file still opens, and a URL names what is missing."""
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from pathlib import Path\n"
        "from agl_grpc.store.storage.database import open_database\n"
        f"open_database(Path({str(tmp_path / 'store.db')!r})).close()\n"
        "try:\n    open_database('postgresql://nobody@nowhere/db')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("DatabaseError a PostgreSQL database needs a driver")
    assert "pip install 'agl-grpc[postgres]'" in done.stdout


async def test_a_database_is_verified_while_a_server_uses_it(postgres: PostgresServer) -> None:
    url = postgres.make_database()
    with pytest.raises(DatabaseError, match="holds no store"):
        verify_postgres(url)
    async with running(url) as rig:
        await rig.enqueue(rollout_id="r")
        (leased,) = await rig.lease()
        await rig.span(leased.attempt, 1)
        report = verify_postgres(url)
        assert report.sound, report.broken
        assert len(report.checked) > 20
        with psycopg.connect(url, autocommit=True) as other:
            other.execute("UPDATE span_totals SET spans = spans + 1")
            (broken,) = verify_postgres(url).broken
            command = [sys.executable, "-m", "agl_grpc_cli", "store", "verify", "--database", url]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
            )
            assert (done.returncode, f"BROKEN {broken.name}" in done.stdout) == (1, True), done
            other.execute("UPDATE span_totals SET spans = spans - 1")


class _Late:
    """A connection whose statements wait until a server is present in the database."""

    def __init__(self, raw: psycopg.Connection[tuple[object, ...]]) -> None:
        self._connection = PostgresConnection(raw)

    def execute(self, sql: str, parameters: tuple[object, ...] = ()) -> object:
        while self._connection.execute(locks.OTHERS, (0,)).fetchone() is None:
            pass
        return self._connection.execute(sql, parameters)


def test_a_lone_server_never_takes_itself_for_a_neighbour(url: str) -> None:
    """Else it would not extend the leases that lived through its absence."""
    for _ in range(5):
        database = open_database(url)
        try:
            database.start(lambda news: None, lambda connection: None)
            with connect(url) as raw:
                assert not database.is_shared(cast(Connection, _Late(raw)))
        finally:
            database.close()
