"""The tables, family by family.

Each family is one `schema_<family>.py` with a `FAMILY`; a database remembers how many of each
family's migrations it has seen. A migration, once released, is never edited: append another.
`user_version` holds the sum, so that a newer database is recognised at a glance.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Tables that belong together.

    Attributes:
        name: Key in the table `schema_families`.
        migrations: SQL scripts in order; script i takes the family from version i to i + 1.
    """

    name: str
    migrations: tuple[str, ...]


class SchemaTooNew(Exception):
    """The database was written by a newer server."""


def families() -> tuple[Family, ...]:
    """All families in the order in which they are created."""
    from agl_grpc.store.storage import (
        schema_blobs,
        schema_core,
        schema_lifecycle,
        schema_resources,
        schema_rewards,
        schema_spans,
        schema_training,
    )

    modules = (
        *(schema_core, schema_resources, schema_lifecycle, schema_spans, schema_rewards, schema_training),
        schema_blobs,
    )
    return tuple(module.FAMILY for module in modules)


def migrate(connection: sqlite3.Connection, chosen: Sequence[Family]) -> int:
    """Brings the database to the newest schema in one transaction.

    Returns:
        How many migrations were applied.

    Raises:
        SchemaTooNew: A family is unknown here or further than this server knows.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        applied = _migrate(connection, chosen)
    except BaseException:
        connection.rollback()
        raise
    connection.execute("COMMIT")
    return applied


def _migrate(connection: sqlite3.Connection, chosen: Sequence[Family]) -> int:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_families (name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"
    )
    have: dict[str, int] = dict(connection.execute("SELECT name, version FROM schema_families"))
    known = {family.name: len(family.migrations) for family in chosen}
    for name, version in have.items():
        if version > known.get(name, -1):
            ours = known.get(name, 0)
            raise SchemaTooNew(f"its tables {name!r} have version {version}, this server knows {ours}")
    applied = 0
    for family in chosen:
        for script in family.migrations[have.get(family.name, 0) :]:
            for statement in statements(script):
                connection.execute(statement)
            applied += 1
        connection.execute(
            "INSERT INTO schema_families VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET version = excluded.version",
            (family.name, len(family.migrations)),
        )
    connection.execute(f"PRAGMA user_version = {sum(known.values())}")
    return applied


def statements(script: str) -> list[str]:
    """Splits a script at semicolons that end a statement (triggers included)."""
    found: list[str] = []
    rest = ""
    for line in script.splitlines(keepends=True):
        rest += line
        if sqlite3.complete_statement(rest):
            found.append(rest.strip())
            rest = ""
    if rest.strip():
        found.append(rest.strip())
    return found
