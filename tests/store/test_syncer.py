"""Commits on their way to the disk: nobody is answered or shown what is not there, and the writer goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from functools import partial
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


def test_the_writer_is_one_commit_ahead_of_the_disk() -> None:
    disk = SlowDisk()
    settled: list[int] = []
    answered: list[int] = []
    went_on = threading.Semaphore(0)
    syncer = Syncer(disk.sync, never)
    syncer.start()

    def write() -> None:
        for number in range(3):
            # When a sync is under way, the writer does none by itself, though it has nothing else to do.
            syncer.settle(partial(answered.append, number), at_once=number > 0)
            settled.append(number)
            went_on.release()

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(3):
        assert disk.begun.acquire(timeout=LONG)
        assert went_on.acquire(timeout=LONG), "it goes on while the sync is under way"
        assert not went_on.acquire(timeout=0.05), "and no further"
        assert settled == list(range(number + 1))
        assert answered == list(range(number)), "nobody is answered before"
        disk.ready.release()
    writer.join(LONG)
    syncer.stop()
    assert (answered, disk.count) == ([0, 1, 2], 3)


def test_a_writer_that_has_nothing_else_to_do_syncs_by_itself() -> None:
    disk, threads = SlowDisk(), []
    syncer = Syncer(disk.sync, never)
    syncer.start()
    disk.ready.release()
    syncer.settle(lambda: threads.append(threading.current_thread()), at_once=True)
    assert threads == [threading.current_thread()]
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
