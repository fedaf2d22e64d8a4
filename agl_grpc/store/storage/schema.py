"""The tables, family by family.

Each family is one `schema_<family>.py` with a `FAMILY`; a database remembers how many of each
family's migrations it has seen. A migration, once released, is never edited: append another.
`user_version` holds the sum, so that a newer database is recognised at a glance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agl_grpc.store.storage.engine import Connection


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
        schema_counters,
        schema_lifecycle,
        schema_resources,
        schema_rewards,
        schema_spans,
        schema_training,
        schema_training_log,
    )

    modules = (
        *(schema_core, schema_resources, schema_lifecycle, schema_spans, schema_rewards, schema_training),
        *(schema_counters, schema_blobs, schema_training_log),
    )
    return tuple(module.FAMILY for module in modules)


def migrate(
    connection: Connection, chosen: Sequence[Family], translate: Callable[[str], str] = lambda sql: sql
) -> int:
    """Brings the database to the newest schema, in a transaction of the caller's.

    Args:
        connection: An open transaction.
        chosen: What the database shall hold.
        translate: Turns a statement of the scripts, which are SQLite's, into the engine's own.

    Returns:
        The sum of the families' versions.

    Raises:
        SchemaTooNew: A family is unknown here or further than this server knows.
    """
    connection.execute(translate(_CREATE_FAMILIES))
    have = check_versions(connection, chosen)
    known = {family.name: len(family.migrations) for family in chosen}
    for family in chosen:
        for script in family.migrations[have.get(family.name, 0) :]:
            for statement in statements(script):
                connection.execute(translate(statement))
        if have.get(family.name) != known[family.name]:
            connection.execute(
                "INSERT INTO schema_families VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET version = excluded.version",
                (family.name, known[family.name]),
            )
    return sum(known.values())


def check_versions(connection: Connection, chosen: Sequence[Family]) -> dict[str, int]:
    """The versions of a database's families.

    Raises:
        SchemaTooNew: A family is unknown here or further than this server knows.
    """
    rows = connection.execute("SELECT name, version FROM schema_families").fetchall()
    have: dict[str, int] = dict(rows)
    known = {family.name: len(family.migrations) for family in chosen}
    for name, version in have.items():
        if version > known.get(name, -1):
            ours = known.get(name, 0)
            raise SchemaTooNew(f"its tables {name!r} have version {version}, this server knows {ours}")
    return have


_CREATE_FAMILIES = (
    "CREATE TABLE IF NOT EXISTS schema_families (name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"
)


def statements(script: str) -> list[str]:
    """Splits a script at the semicolons that end a line."""
    return [part.strip() for part in (script.strip() + "\n").split(";\n") if part.strip()]
