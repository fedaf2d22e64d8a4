"""Commits on their way to the disk: nobody is answered or shown what is not there, and the writer goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sqlite.connection import SqliteConnection
from agl_grpc.store.storage.syncer import Syncer
from agl_grpc.store.store import Store

LONG = 60.0


class SlowDisk:
    """A sync that takes as long as the test wants."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = threading.Semaphore(0)
        self.ready = threading.Semaphore(0)

    def sync(self) -> None:
        """Says that it has begun and waits until it may end."""
        self.count += 1
        self.begun.release()
        assert self.ready.acquire(timeout=LONG)


def never(error: Exception) -> NoReturn:
    """No sync fails."""
    raise AssertionError(error)


async def test_nobody_is_answered_or_shown_what_is_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(db: Connection) -> set[str]:
        return {name for (name,) in db.execute("SELECT name FROM meta")}

    store = await Store.open(tmp_path / "store.db")
    try:
        disk, sync = SlowDisk(), SqliteConnection.sync

        def slow(connection: SqliteConnection) -> None:
            disk.sync()
            sync(connection)

        with monkeypatch.context() as patch:
            patch.setattr(SqliteConnection, "sync", slow)
            insert = "INSERT INTO meta VALUES ('new', '1')"
            written = asyncio.ensure_future(store.write(lambda tx: tx.execute(insert).rowcount))
            assert await asyncio.to_thread(disk.begun.acquire, timeout=LONG)
            while "new" not in await store.reads.run(names):
                # That was a commit of the store's own housekeeping.
                disk.ready.release()
                assert await asyncio.to_thread(disk.begun.acquire, timeout=LONG)
            read = asyncio.ensure_future(store.read(names))
            shared = asyncio.ensure_future(store.read_shared("names", names))
            # What waits for the disk has been read: a read that does not wait for it sees the commit.
            for _ in range(3):
                assert "new" in await store.reads.run(names)
            assert not any(one.done() for one in (written, read, shared))
            disk.ready.release(100)
            assert await written == 1
        assert "new" in await read
        assert "new" in await shared
    finally:
        await store.close()


def test_one_sync_serves_all_that_came_during_the_last() -> None:
    disk, answered = SlowDisk(), []
    syncer = Syncer(disk.sync, never)
    syncer.start()
    syncer.settle(lambda: answered.append(0), at_once=False)
    assert disk.begun.acquire(timeout=LONG)
    for number in range(1, 5):
        # It is not the turn of the last one, though the writer has nothing else to do.
        syncer.settle(lambda number=number: answered.append(number), at_once=True)  # type: ignore[misc] # inferred
    assert (answered, disk.count) == ([], 1)
    disk.ready.release()
    assert disk.begun.acquire(timeout=LONG)
    assert answered == [0]
    disk.ready.release()
    syncer.stop()
    assert (answered, disk.count) == ([0, 1, 2, 3, 4], 2)


def test_a_writer_that_has_nothing_else_to_do_syncs_by_itself() -> None:
    disk, threads = SlowDisk(), []
    syncer = Syncer(disk.sync, never)
    syncer.start()
    disk.ready.release()
    syncer.settle(lambda: threads.append(threading.current_thread()), at_once=True)
    assert threads == [threading.current_thread()]
    syncer.stop()


def test_a_disk_that_stalls_stalls_the_writer() -> None:
    disk, taken = SlowDisk(), threading.Semaphore(0)
    syncer = Syncer(disk.sync, never)
    syncer.start()

    def write() -> None:
        for _ in range(100):
            syncer.settle(lambda: None, at_once=False)
            taken.release()

    writer = threading.Thread(target=write)
    writer.start()
    assert disk.begun.acquire(timeout=LONG)
    for _ in range(16):
        assert taken.acquire(timeout=LONG)
    writer.join(0.2)
    assert writer.is_alive()
    while writer.is_alive():
        disk.ready.release()
        writer.join(0.01)
    disk.ready.release(100)
    syncer.stop()


def test_a_sync_that_fails_ends_the_process_at_once(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, errno, sys
        from pathlib import Path
        from agl_grpc.store.storage.sqlite.connection import SqliteConnection
        from agl_grpc.store.store import Store

        def fail(connection):
            raise OSError(errno.EIO, "Input/output error")

        async def main():
            store = await Store.open(Path(sys.argv[1]))
            SqliteConnection.sync = fail
            await store.write(lambda tx: tx.execute("INSERT INTO meta VALUES ('lost', '1')"))
            print("answered", flush=True)

        asyncio.run(main())
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("agl-grpc store: storage failed, stopping at once:"), line
