"""The writer, the database file and request ids: durability, isolation of commands, refusals."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agl_grpc.store.clock import ManualClock
from agl_grpc.store.errors import StoreError
from agl_grpc.store.storage import idempotency, maintenance
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.engine import Connection, DatabaseError
from agl_grpc.store.storage.idempotency import RequestKey
from agl_grpc.store.storage.sqlite.database import open_sqlite
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import error_reason_pb2, event_pb2


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(tmp_path / "store.db", clock=ManualClock())
    yield store
    await store.close()


def put(name: str, value: str) -> Callable[[Tx], None]:
    def run(tx: Tx) -> None:
        tx.execute("INSERT INTO meta VALUES (?, ?)", (name, value))

    return run


async def names(store: Store) -> set[str]:
    return await store.read(lambda db: {row[0] for row in db.execute("SELECT name FROM meta")})


async def test_a_shared_read_survives_whoever_leaves(store: Store) -> None:
    reads: list[int] = []

    def read(_db: Connection) -> int:
        reads.append(len(reads))
        return reads[-1]

    tasks = [asyncio.create_task(store.read_shared("page", read)) for _ in range(3)]
    await asyncio.sleep(0)  # all of them wait now
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [0, 0]
    assert await store.read_shared("page", read) == 1, "what is read is not kept"


async def test_a_shared_read_that_fails_fails_for_all(store: Store) -> None:
    def read(_db: Connection) -> None:
        raise LookupError("gone")

    both = (store.read_shared("page", read), store.read_shared("page", read))
    results = await asyncio.gather(*both, return_exceptions=True)
    assert [str(result) for result in results] == ["gone", "gone"]


async def test_a_failing_command_is_undone_alone(store: Store) -> None:
    def broken(tx: Tx) -> None:
        tx.execute("INSERT INTO meta VALUES ('half', '1')")
        tx.execute("INSERT INTO meta VALUES ('good', 'taken already')")

    rolled: list[str] = []

    def refused(tx: Tx) -> None:
        tx.after_rollback(lambda: rolled.append("refused"))
        tx.event(1, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_CREATED, 1)
        tx.execute("INSERT INTO meta VALUES ('refused', '1')")
        raise StoreError(9, error_reason_pb2.ERROR_REASON_ILLEGAL_TRANSITION, "no")

    results = await asyncio.gather(
        store.write(put("good", "1")),
        store.write(broken),
        store.write(refused),
        store.write(put("later", "1")),
        return_exceptions=True,
    )
    assert results[0] is None
    assert results[3] is None
    assert isinstance(results[1], StoreError)
    assert results[1].reason_name == "INTERNAL"
    assert isinstance(results[2], StoreError)
    assert results[2].reason_name == "ILLEGAL_TRANSITION"
    assert set(rolled) == {"refused"}
    found = await names(store)
    assert {"good", "later"} <= found
    assert not {"half", "refused"} & found
    assert await store.read(lambda db: db.execute("SELECT count(*) FROM events").fetchone()[0]) == 0


async def test_lifecycle_passes_before_spans(store: Store) -> None:
    order: list[str] = []
    gate = store.write(lambda tx: order.append("first"))
    spans = [store.writer.submit(lambda tx: order.append("span"), Lane.SPANS, 100) for _ in range(5)]
    life = [store.writer.submit(lambda tx: order.append("life")) for _ in range(5)]
    await asyncio.gather(gate, *spans, *life)
    assert order.index("span") > max(i for i, what in enumerate(order) if what == "life")


async def test_positions_rise_in_commit_order(store: Store) -> None:
    def event(ref: int) -> Callable[[Tx], None]:
        return lambda tx: tx.event(7, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_UPDATED, ref)

    waiter = store.hub.add([event_pb2.ENTITY_KIND_RUN], run_keys=[7])
    await asyncio.gather(*(store.write(event(i)) for i in range(50)))
    assert await waiter.wait(5)
    rows = await store.read(
        lambda db: db.execute("SELECT position, ref FROM events ORDER BY position").fetchall()
    )
    assert rows == [(i + 1, i) for i in range(50)]


async def test_the_same_request_is_carried_out_once(store: Store) -> None:
    def run(tx: Tx) -> bytes:
        (count,) = tx.execute("SELECT count(*) FROM meta WHERE name LIKE 'run-%'").fetchone()
        tx.execute("INSERT INTO meta VALUES (?, '')", (f"run-{count + 1}",))
        return b"answer %d" % (count + 1)

    key = RequestKey("p", "M", "id-1", b"request")
    assert await store.change(key, run) == b"answer 1"
    assert await store.change(key, run) == b"answer 1"
    assert await store.change(RequestKey("q", "M", "id-1", b"request"), run) == b"answer 2"
    assert await store.change(RequestKey("p", "M", "", b"request"), run) == b"answer 3"
    assert await store.change(RequestKey("p", "M", "", b"request"), run) == b"answer 4"
    with pytest.raises(StoreError) as caught:
        await store.change(RequestKey("p", "M", "id-1", b"another"), run)
    assert caught.value.reason_name == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("earlier", [True, False])
async def test_a_repeat_among_others_changes_nothing(store: Store, earlier: bool) -> None:
    """In the transaction of the first or a later one: it is answered alike, and its neighbours go through."""

    def run(tx: Tx) -> bytes:
        (count,) = tx.execute("SELECT count(*) FROM meta WHERE name LIKE 'run-%'").fetchone()
        tx.execute("INSERT INTO meta VALUES (?, '')", (f"run-{count + 1}",))
        tx.event(1, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_UPDATED, count + 1)
        return b"answer %d" % (count + 1)

    def key(name: str) -> RequestKey:
        return RequestKey("p", "M", name, b"request")

    if earlier:
        assert await store.change(key("same"), run) == b"answer 1"
    answers = await asyncio.gather(
        store.change(key("same"), run),
        store.write(put("before", "1")),
        store.change(key("other"), run),
        store.change(key("same"), run),
        store.write(put("after", "1")),
        store.change(RequestKey("p", "M", "other", b"another request"), run),
        return_exceptions=True,
    )
    assert answers[:5] == [b"answer 1", None, b"answer 2", b"answer 1", None]
    assert isinstance(answers[5], StoreError)
    assert answers[5].reason_name == "REQUEST_ID_REUSED"
    assert {"before", "after", "run-1", "run-2"} <= await names(store)
    assert await store.read(lambda db: db.execute("SELECT ref FROM events").fetchall()) == [(1,), (2,)]


async def test_an_answer_that_came_to_nothing_is_not_remembered(store: Store) -> None:
    """What was noted for the end of the transaction goes with the command that is undone."""

    def fail(tx: Tx) -> None:
        idempotency.save_new(tx, key, b"half")
        tx.execute("INSERT INTO meta VALUES ('half', '1')")
        raise StoreError(9, error_reason_pb2.ERROR_REASON_ILLEGAL_TRANSITION, "no")

    key = RequestKey("p", "M", "id-1", b"request")
    failing, answer = store.write(fail), store.change(key, lambda tx: b"whole")
    results = await asyncio.gather(failing, answer, return_exceptions=True)
    assert isinstance(results[0], StoreError)
    assert results[1] == b"whole"
    assert await store.change(key, lambda tx: b"new") == b"whole"


async def test_a_refused_request_leaves_its_id_free(store: Store) -> None:
    def refuse(tx: Tx) -> bytes:
        raise StoreError(5, error_reason_pb2.ERROR_REASON_ENTITY_NOT_FOUND, "not yet")

    key = RequestKey("p", "M", "id-1", b"request")
    with pytest.raises(StoreError, match="not yet"):
        await store.change(key, refuse)
    assert await store.change(key, lambda tx: b"now") == b"now"


async def test_old_request_ids_and_events_are_pruned(store: Store) -> None:
    clock = store.clock
    assert isinstance(clock, ManualClock)

    def run(tx: Tx) -> bytes:
        tx.event(1, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_UPDATED, 1)
        return b""

    for i in range(3):
        await store.change(RequestKey("p", "M", f"id-{i}", b""), run)
    clock.advance(23 * 3600)
    await store.change(RequestKey("p", "M", "young", b""), run)
    clock.advance(2 * 3600)
    assert await store.write(idempotency.prune) == 3
    assert await store.write(maintenance.prune_events) == 3
    assert await store.read(lambda db: db.execute("SELECT position FROM events").fetchall()) == [(4,)]
    clock.advance(25 * 3600)
    assert await store.write(maintenance.prune_events) == 0, "the newest position is kept"


async def fill(store: Store) -> None:
    for i in range(100):
        await store.write(put(f"n{i}", "x" * 20_000))


async def test_a_full_disk_refuses_writes_serves_reads_and_recovers(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db", limit_pages=100)
    returns: list[int] = []
    store.writer.on_return.append(lambda tx: returns.append(tx.now))
    try:
        with pytest.raises(StoreError) as caught:
            await fill(store)
        assert returns == []
        assert caught.value.reason_name == "STORAGE_FULL"
        assert caught.value.retry_after
        assert "n0" in await names(store)
        await store.write(lambda tx: tx.execute("DELETE FROM meta WHERE name LIKE 'n%'"))
        await store.write(put("after", "x" * 20_000))
        assert "after" in await names(store)
        assert len(returns) == 1, "the first group after those that were refused says so, and only that one"
    finally:
        await store.close()


def test_two_servers_cannot_open_one_database(tmp_path: Path) -> None:
    first = open_sqlite(tmp_path / "store.db")
    with pytest.raises(DatabaseError, match="in use by another store server"):
        open_sqlite(tmp_path / "store.db")
    first.close()
    open_sqlite(tmp_path / "store.db").close()


def test_a_throw_away_database_is_removed() -> None:
    database = open_sqlite(None)
    assert database.path.exists()
    database.close()
    assert not database.path.parent.exists()


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"this is no database at all " * 400)
    with pytest.raises(DatabaseError, match="damaged or no database"):
        open_sqlite(noise)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE t (a)")
    foreign.close()
    with pytest.raises(DatabaseError, match="another program"):
        open_sqlite(tmp_path / "foreign.db")


def test_damage_is_found_at_start(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    open_sqlite(path).close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    path.write_bytes(data)
    with pytest.raises(DatabaseError, match="damaged"):
        open_sqlite(path)


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    open_sqlite(path).close()
    newer = sqlite3.connect(path)
    newer.execute("UPDATE schema_families SET version = 99 WHERE name = 'core'")
    newer.commit()
    newer.close()
    with pytest.raises(DatabaseError, match="newer server"):
        open_sqlite(path)


def test_a_storage_error_ends_the_process_at_once(tmp_path: Path) -> None:
    """A file-size limit makes real writes fail with EFBIG, which SQLite reports as an I/O error."""
    program = textwrap.dedent(
        """
        import asyncio, resource, sys
        from pathlib import Path
        from agl_grpc.store.store import Store

        async def main():
            store = await Store.open(Path(sys.argv[1]))
            await store.write(lambda tx: tx.execute("INSERT INTO meta VALUES ('kept', '1')"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            for i in range(100):
                row = (f"n{i}", "x" * 20_000)
                await store.write(lambda tx: tx.execute("INSERT INTO meta VALUES (?, ?)", row))

        asyncio.run(main())
        """
    )
    path = tmp_path / "store.db"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "storage failed, stopping at once" in done.stderr
    assert "Traceback" not in done.stderr
    database = open_sqlite(path)
    kept = database.connect_reader().execute("SELECT value FROM meta WHERE name = 'kept'").fetchall()
    assert kept == [("1",)]
    database.close()


async def test_the_write_ahead_log_stays_small_while_commits_go_on(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db")
    try:
        for i in range(60):
            await store.write(
                lambda tx, i=i: tx.execute("INSERT INTO meta VALUES (?, ?)", (f"n{i}", "x" * (2 << 20)))
            )
        log = tmp_path / "store.db-wal"
        assert log.stat().st_size < 100 << 20
        assert (tmp_path / "store.db").stat().st_size > 20 << 20, "most of it was moved meanwhile"
    finally:
        await store.close()


async def test_a_foreign_write_lock_is_waited_for(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db")
    try:
        foreign = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        writing = asyncio.ensure_future(store.write(put("late", "1")))
        done, _ = await asyncio.wait([writing], timeout=0.2)
        assert not done
        foreign.execute("COMMIT")
        foreign.close()
        await writing
        assert "late" in await names(store)
    finally:
        await store.close()
