"""Opens the database that a server is told to use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from agl_grpc.store.storage.engine import Connection, Database, DatabaseError
from agl_grpc.store.storage.sqlite.database import open_sqlite

_POSTGRES = ("postgresql://", "postgres://")


def open_database(where: Path | str | None, *, limit_pages: int = 0) -> Database:
    """Opens or makes a database.

    Args:
        where: An SQLite file, or `postgresql://user@host/name`; None = a private throw-away file.
        limit_pages: Largest size of a file in pages of 8 KiB; 0 = the disk's.

    Raises:
        DatabaseError: It cannot be used; one line says why and what to do.
    """
    if isinstance(where, str):
        if "://" in where:
            return _open_postgres(_postgres(where))
        where = Path(where)
    return open_sqlite(where, limit_pages=limit_pages)


def _postgres(url: str) -> str:
    """The URL, if it is one of a PostgreSQL server."""
    if not url.startswith(_POSTGRES):
        # Only so much of it: a URL may hold a password.
        kind = url.partition("://")[0]
        raise DatabaseError(
            f"a {kind}:// database is not supported; name a file or postgresql://user@host/name"
        )
    return url


def reading_postgres(url: str) -> AbstractContextManager[Connection]:
    """A read transaction over a PostgreSQL database.

    Raises:
        DatabaseError: As `open_database`; also, on entering, when it holds no store.
    """
    with _driver():
        from agl_grpc.store.storage.postgres.database import reading
    return reading(_postgres(url))


def _open_postgres(url: str) -> Database:
    with _driver():
        from agl_grpc.store.storage.postgres.database import open_postgres
    return open_postgres(url)


@contextmanager
def _driver() -> Iterator[None]:
    """Around imports that need the driver, which is an extra."""
    try:
        yield
    except ImportError as error:
        raise DatabaseError(
            f"a PostgreSQL database needs a driver ({error}): pip install 'agl-grpc[postgres]'"
        ) from error
