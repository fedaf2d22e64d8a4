"""Databases verified, and SQLite files restored when they are sound."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from agl_grpc.store.storage.database import reading_postgres
from agl_grpc.store.storage.engine import Connection, DatabaseError
from agl_grpc.store.storage.schema import check_versions, families, migrate
from agl_grpc.store.storage.sqlite.database import is_damage, truncation
from agl_grpc.store.storage.sqlite.operations import put_back, reading
from agl_grpc.store.verify.check import check
from agl_grpc.store.verify.types import Broken, Invariant, Report


def verify(path: Path, *, deep: bool = True, progress: Callable[[str], None] = lambda name: None) -> Report:
    """Checks a file: its pages, its tables, every invariant of the store.

    Args:
        path: The file; a server may have it.
        deep: Whether to read what is stored too.
        progress: Called with the name of what is looked at next.

    Raises:
        DatabaseError: It cannot be read at all, or a newer server wrote it.
    """
    problem = truncation(path) if path.is_file() else ""
    if problem:
        return _unreadable(problem)
    try:
        with reading(path) as connection:
            connection.begin_read()
            return check(connection, deep=deep, before=(_WHOLE, _AS_MADE), progress=progress)
    except DatabaseError as error:
        cause = error.__cause__
        if isinstance(cause, sqlite3.DatabaseError) and is_damage(cause):
            return _unreadable(str(cause))
        raise


def verify_postgres(
    url: str, *, deep: bool = True, progress: Callable[[str], None] = lambda name: None
) -> Report:
    """Checks a PostgreSQL database: every invariant of the store, at one moment; servers may use it.

    Raises:
        DatabaseError: It cannot be read, holds no store, or one of another version.
    """
    with reading_postgres(url) as connection:
        return check(connection, deep=deep, progress=progress)


def _unreadable(problem: str) -> Report:
    return Report([_WHOLE.name], [Broken(_WHOLE.name, _WHOLE.says, [problem], 1)])


def _pages(db: Connection) -> Iterable[str]:
    for (line,) in db.execute("PRAGMA integrity_check(20)"):
        if line != "ok":
            yield " ".join(line.split())


def _tables(db: Connection) -> Iterable[str]:
    versions = check_versions(db, families())
    for family in families():
        have, known = versions.get(family.name, 0), len(family.migrations)
        if have != known:
            yield f"tables {family.name!r} have version {have}, this server makes {known}: run migrate"
    if any(versions.get(family.name, 0) != len(family.migrations) for family in families()):
        return
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrate(fresh, families())
        wanted, found = _schema(fresh), _schema(db)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} does not belong here"
        elif wanted[name] != found[name]:
            yield f"{name} is not as it was made: {found[name]}"


_WHOLE = Invariant("file.pages", "the file is whole, its pages and indexes are in order", _pages)
_AS_MADE = Invariant("file.tables", "tables and indexes are as this version makes them", _tables)


def _schema(db: Any) -> dict[str, str]:
    rows = db.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    return {f"{kind} {name}": " ".join((sql or "").split()) for kind, name, sql in rows}


def restore(copy: Path, target: Path, *, force: bool = False) -> Report:
    """Puts a copy in the place of a database that no server has, if the copy is sound.

    Args:
        copy: What a backup made.
        target: The database.
        force: Whether to replace one that is there; it is kept beside it as `NAME.replaced`.

    Returns:
        What the check of the copy found.

    Raises:
        DatabaseError: The copy cannot be read, a server has the target, or the target is there.
    """
    report = verify(copy)
    if report.sound:
        put_back(copy, target, force=force)
    return report
