"""Reads: a small pool of threads, each with a connection of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from agl_grpc.store.errors import storage_away
from agl_grpc.store.storage.engine import Connection, Database, ReadConnection, Trouble

T = TypeVar("T")


class ReadPool:
    """Runs read functions off the event loop, each in one short read transaction.

    Args:
        database: What is read.
        size: Threads.
    """

    def __init__(self, database: Database, size: int = 2) -> None:
        self._database = database
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="store-read")

    async def run(self, read: Callable[[Connection], T]) -> T:
        """Runs `read` in a transaction: all its statements see one state of the store.

        Keep it to one page of results; an open read transaction lets the write-ahead log grow.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, read)

    def _run(self, read: Callable[[Connection], T]) -> T:
        try:
            return self._try(read)
        except Exception as error:
            if self._database.trouble(error) is not Trouble.AWAY:
                raise
        # The connection may be broken only because the database was started again.
        try:
            return self._try(read)
        except Exception as error:
            if self._database.trouble(error) is not Trouble.AWAY:
                raise
            raise storage_away() from error

    def _try(self, read: Callable[[Connection], T]) -> T:
        connection: ReadConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._database.connect_reader()
        try:
            connection.begin_read()
            try:
                return read(connection)
            finally:
                connection.rollback()
        except Exception as error:
            if self._database.trouble(error) is Trouble.AWAY:
                self._local.connection = None
                connection.close()
            raise

    def close(self) -> None:
        """Waits for reads under way and ends the threads."""
        self._executor.shutdown(wait=True)


def position(connection: Connection) -> int:
    """Newest position of the event log in this transaction; 0 = nothing happened yet."""
    (newest,) = connection.execute("SELECT max(position) FROM events").fetchone()
    return int(newest or 0)


def oldest_position(connection: Connection) -> int:
    """Oldest position still in the log; 0 = nothing happened yet."""
    (oldest,) = connection.execute("SELECT min(position) FROM events").fetchone()
    return int(oldest or 0)
