"""What an operator does to an SQLite file: read, copy, put back, compact, bring up to date."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agl_grpc.store.storage.engine import DatabaseError
from agl_grpc.store.storage.schema import SchemaTooNew, check_versions, families
from agl_grpc.store.storage.sqlite.connection import SqliteConnection
from agl_grpc.store.storage.sqlite.database import (
    APPLICATION_ID,
    explain,
    lock_database,
    open_sqlite,
    refuse_folder,
)

_SIDE_FILES = ("-wal", "-shm", "-journal")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[SqliteConnection]:
    """A connection that reads a file, also while a server has it; its errors become DatabaseError."""
    refuse_folder(path)
    if not path.is_file():
        raise DatabaseError(f"database {path} does not exist")
    connection = None
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, factory=SqliteConnection
        )
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        if owner != APPLICATION_ID:
            raise DatabaseError(f"{path} is not a store's database; name another file")
        yield connection
    except SchemaTooNew as error:
        raise DatabaseError(
            f"database {path} was written by a newer server ({error}); use that version"
        ) from error
    except sqlite3.Error as error:
        raise DatabaseError(f"database {path} cannot be read: {explain(error)}") from error
    finally:
        if connection is not None:
            connection.close()


@dataclass(frozen=True)
class Sizes:
    """Bytes of a database before and after."""

    before: int
    after: int


def backup(source: Path, target: Path, *, force: bool = False) -> int:
    """Copies a database, also while a server writes to it: the copy is one moment's state.

    Args:
        source: The database.
        target: The copy, one file; it appears when it is complete, on disk and sound.
        force: Whether to replace a file that is there.

    Returns:
        The copy's bytes.

    Raises:
        DatabaseError: The source cannot be read, the target is there or cannot be written.
    """
    refuse_folder(target)
    if target.exists() and not force:
        raise DatabaseError(f"{target} is there already; name another file or say --force")
    partial = target.with_name(target.name + ".partial")
    with reading(source) as connection, _writing(partial) as copy:
        check_versions(connection, families())
        # In one step: a backup in several begins anew whenever the server writes in between.
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
        (verdict,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise DatabaseError(f"the copy of {source} is damaged ({verdict}); check the source with verify")
    _replace(partial, target)
    return target.stat().st_size


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        path.unlink(missing_ok=True)
        raise DatabaseError(f"{path} cannot be written: {explain(error)}") from error
    except OSError as error:
        raise DatabaseError(f"{path} cannot be written: {error.strerror or error}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _replace(partial: Path, target: Path) -> None:
    """Puts a complete file in its place, durably."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def put_back(copy: Path, target: Path, *, force: bool = False) -> None:
    """Puts a copy in the place of a database that no server has.

    Args:
        copy: What `backup` made.
        target: The database.
        force: Whether to replace one that is there; it is kept beside it as `NAME.replaced`.

    Raises:
        DatabaseError: The copy cannot be read, a server has the target, or the target is there.
    """
    refuse_folder(target)
    if target.exists() and not force:
        raise DatabaseError(f"database {target} is there already; say --force to replace it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(f"{target} cannot be written: {error.strerror or error}") from error
    with lock_database(target):
        arrived = target.with_name(target.name + ".restoring")
        backup(copy, arrived, force=True)
        if target.exists():
            _settle(target)
            os.replace(target, target.with_name(target.name + ".replaced"))
        for ending in _SIDE_FILES:
            target.with_name(target.name + ending).unlink(missing_ok=True)
        _replace(arrived, target)


def _settle(path: Path) -> None:
    """Moves the write-ahead log into the file, so that the file alone is the database; damaged ones stay."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def compact(path: Path) -> Sizes:
    """Gives the space of deleted rows back to the disk; no server may have the file.

    Raises:
        DatabaseError: It cannot be opened, or there is no room for the copy that this makes.
    """
    with _alone(path) as connection:
        before = path.stat().st_size
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Sizes(before, path.stat().st_size)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[sqlite3.Connection]:
    refuse_folder(path)
    if not path.is_file():
        raise DatabaseError(f"database {path} does not exist")
    with lock_database(path):
        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                (owner,) = connection.execute("PRAGMA application_id").fetchone()
                if owner != APPLICATION_ID:
                    raise DatabaseError(f"{path} is not a store's database; name another file")
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.Error as error:
            raise DatabaseError(f"database {path} cannot be used: {explain(error)}") from error


def versions_of(path: Path) -> dict[str, int]:
    """The versions of a file's tables, family by family.

    Raises:
        DatabaseError: It cannot be read, or a newer server wrote it.
    """
    with reading(path) as connection:
        return check_versions(connection, families())


def bring_up_to_date(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Applies the migrations that a file lacks, as a server does when it starts.

    Returns:
        The versions of its tables before and after.

    Raises:
        DatabaseError: It cannot be used, or a server has it.
    """
    before = versions_of(path)
    open_sqlite(path).close()
    return before, versions_of(path)
