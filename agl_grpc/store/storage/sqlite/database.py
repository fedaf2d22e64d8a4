"""The SQLite file: opening, locking, checking, migrating."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from agl_grpc.store.clock import Clock, SystemClock
from agl_grpc.store.ids import mint
from agl_grpc.store.storage.engine import Connection, DatabaseError, News, Trouble
from agl_grpc.store.storage.schema import SchemaTooNew, families, migrate
from agl_grpc.store.storage.sqlite.checkpoints import Checkpointer
from agl_grpc.store.storage.sqlite.connection import SqliteConnection

APPLICATION_ID = 0x41474C47
"""Marks a file as a store's database."""

_CHECK_LIMIT = 256 << 20
_CHECKPOINT_PAGES = 8_000
# Of a new database. A model call of a thousand tokens has 6 KiB: smaller pages would spread it over several.
_PAGE_BYTES = 8192
_HEADER_BYTES = 100


_FATAL = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOMEM,
    }
)


@dataclass
class SqliteDatabase:
    """An open database and the right to be its only server.

    Attributes:
        path: The file.
        memory: Whether it is a private throw-away file: nothing outlives `close`.
        store_id: Identity of the database, minted when it was made.
        limit_pages: Largest size in pages of 8 KiB; 0 = the disk's.
        newest_time: The newest moment that the last server has written, in microseconds; 0 = none.
    """

    path: Path
    memory: bool
    limit_pages: int = 0
    store_id: str = ""
    newest_time: int = 0
    _lock: IO[str] | None = None
    _folder: Path | None = None
    _open: list[SqliteConnection] = field(default_factory=list)
    _checkpointer: Checkpointer | None = None

    @property
    def backend(self) -> str:
        """The engine's name in the contract."""
        return "memory" if self.memory else "sqlite"

    def describe(self) -> str:
        """Where it is, for people."""
        return "in memory (lost at exit)" if self.memory else f"database {self.path.absolute()}"

    def clock(self) -> Clock:
        """This machine's clock; it never falls, also not from one server to the next."""
        return SystemClock(self.newest_time)

    def connect_writer(self, _clock: Clock) -> SqliteConnection:
        """The one connection that writes. Transactions are begun by hand."""
        connection = self._connect_to_write()
        connection.load_counters()
        if not self.memory:
            # A commit then writes its frames only, and `sync` brings them to the disk: what FULL does in one.
            # SQLite itself still syncs the log before a checkpoint, and the file before the log begins anew.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.open_log(self.path.with_name(self.path.name + "-wal"))
        return connection

    def _connect_to_write(self) -> SqliteConnection:
        connection = self._connect()
        connection.execute(f"PRAGMA synchronous = {'OFF' if self.memory else 'FULL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.execute("PRAGMA cache_size = -65536")
        if self.limit_pages:
            connection.execute(f"PRAGMA max_page_count = {self.limit_pages}")
        return connection

    def connect_reader(self) -> SqliteConnection:
        """A connection that cannot write."""
        connection = self._connect()
        connection.execute("PRAGMA query_only = ON")
        return connection

    def connect_checkpointer(self) -> SqliteConnection:
        """A connection that moves the write-ahead log into the database, as durably as the writer does."""
        connection = self._connect()
        connection.execute(f"PRAGMA synchronous = {'OFF' if self.memory else 'FULL'}")
        return connection

    def _connect(self) -> SqliteConnection:
        connection = sqlite3.connect(
            self.path,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
            timeout=10.0,
            factory=SqliteConnection,
        )
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA temp_store = MEMORY")
        self._open.append(connection)
        return connection

    def start(self, _on_news: Callable[[News], None], _next_due: Callable[[Connection], int | None]) -> None:
        """Begins to move the write-ahead log into the file. Other servers there are none."""
        self._checkpointer = Checkpointer(self.path, self.connect_checkpointer)
        self._checkpointer.start()

    def is_shared(self, _connection: Connection) -> bool:
        """Never: the lock file says so."""
        return False

    def trouble(self, error: BaseException) -> Trouble:
        """What an exception means for the writer."""
        if not isinstance(error, sqlite3.Error):
            return Trouble.NONE
        code = _code(error)
        if code == sqlite3.SQLITE_FULL:
            return Trouble.FULL
        if code == sqlite3.SQLITE_BUSY:
            return Trouble.BUSY
        return Trouble.FATAL if code in _FATAL else Trouble.NONE

    def explain(self, error: BaseException) -> str:
        """One line for people about what SQLite says."""
        return explain(error)

    def size_bytes(self, _connection: Connection) -> int:
        """Bytes of the file and its write-ahead log."""
        total = 0
        for path in (self.path, self.path.with_name(self.path.name + "-wal")):
            if path.exists():
                total += path.stat().st_size
        return total

    def close(self) -> None:
        """Closes every connection, gives the lock back, removes a throw-away file."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        for connection in self._open:
            connection.close()
        self._open.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None


def open_sqlite(path: Path | None, *, limit_pages: int = 0) -> SqliteDatabase:
    """Opens or makes a database and takes it for this process alone.

    Args:
        path: The file; None = a private throw-away file.
        limit_pages: Largest size in pages of 8 KiB; 0 = the disk's.

    Raises:
        DatabaseError: It is in use, not ours, damaged, newer than this server, or the disk is full.
    """
    folder = None
    if path is None:
        folder = Path(tempfile.mkdtemp(prefix="agl-grpc-"))
        path = folder / "store.db"
    database = SqliteDatabase(path, memory=folder is not None, limit_pages=limit_pages, _folder=folder)
    try:
        _prepare(database)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: SqliteDatabase) -> None:
    path = database.path
    try:
        refuse_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        database._lock = lock_database(path)
        problem = truncation(path) if path.exists() else ""
        if problem:
            raise _damaged(path, problem)
        connection = database._connect_to_write()
        _recognise(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        _check(connection, path)
        connection.execute("BEGIN IMMEDIATE")
        versions = migrate(connection, families())
        connection.execute(f"PRAGMA user_version = {versions}")
        connection.execute("COMMIT")
        database.store_id = _identify(connection)
        database.newest_time = _newest_time(connection)
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        connection.close()
        database._open.remove(connection)
    except SchemaTooNew as error:
        raise DatabaseError(
            f"database {path} was written by a newer server ({error}); use that version or another database"
        ) from error
    except sqlite3.Error as error:
        raise DatabaseError(f"database {path} cannot be used: {explain(error)}") from error
    except OSError as error:
        raise DatabaseError(f"database {path} cannot be opened: {error.strerror or error}") from error


def refuse_folder(path: Path) -> None:
    """Raises DatabaseError when a folder stands where a file has to be."""
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder; name a file in it")


def lock_database(path: Path) -> IO[str]:
    """Takes a file for this process alone, until what this returns is closed.

    Raises:
        DatabaseError: A server has it.
    """
    lock_path = path.with_name(path.name + ".lock")
    lock = open(lock_path, "a+", encoding="utf-8")  # noqa: SIM115 - held open for the life of the server
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise DatabaseError(
            f"database {path} is in use by another store server (process {owner}); "
            "stop that one or name another database"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _recognise(connection: SqliteConnection, path: Path) -> None:
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if owner == APPLICATION_ID:
        return
    if tables:
        raise DatabaseError(f"{path} is an SQLite database of another program; name another file")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _check(connection: SqliteConnection, path: Path) -> None:
    # All of a very large file would take minutes; damage in it is found on use, and is fatal then.
    if path.stat().st_size > _CHECK_LIMIT:
        return
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _damaged(path, " ".join(verdict.split()))


def _damaged(path: Path, problem: str) -> DatabaseError:
    return DatabaseError(
        f"database {path} is damaged: {problem}; `agl-grpc store verify` says all, "
        "`agl-grpc store restore` puts a backup in its place"
    )


def truncation(path: Path) -> str:
    """What a file lacks of what it says to hold, by its header; empty = nothing.

    A file whose write-ahead log still holds pages may be shorter until they are moved into it.
    """
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        return ""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    have = path.stat().st_size
    if not header:
        return ""
    if len(header) < _HEADER_BYTES:
        return f"it has {have} bytes, which is less than a database begins with"
    number = int.from_bytes
    # The header's count of pages holds only if it was written together with the last change.
    if header[24:28] != header[92:96]:
        return ""
    size = number(header[16:18], "big")
    whole = number(header[28:32], "big") * (65536 if size == 1 else size)
    return f"it has {have} bytes and should have {whole}: it was cut off" if have < whole else ""


def _identify(connection: SqliteConnection) -> str:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO meta VALUES ('store_id', ?) ON CONFLICT DO NOTHING", (mint("st"),))
    # Written at every start, so that a full or read-only disk is found now and not at the first request.
    connection.execute(
        "INSERT INTO meta VALUES ('starts', '1') "
        "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
    )
    (store_id,) = connection.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
    connection.execute("COMMIT")
    return str(store_id)


def _newest_time(connection: SqliteConnection) -> int:
    (newest,) = connection.execute(
        "SELECT coalesce(max(time), 0) FROM (SELECT time FROM events WHERE position = "
        "(SELECT max(position) FROM events) UNION ALL SELECT max(last_heartbeat_time) FROM workers)"
    ).fetchone()
    return int(newest)


def explain(error: BaseException) -> str:
    """One line for people about what SQLite says."""
    code = _code(error)
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full; free some space"
    if is_damage(error):
        return f"it is damaged or no database ({error}); restore a copy or name another file"
    if code == sqlite3.SQLITE_READONLY:
        return "it cannot be written; check its permissions"
    return str(error)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite cannot make sense of the file."""
    return _code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
