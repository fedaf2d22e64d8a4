"""Everything that a store's database holds, to compare it before and after.

Two tables are left out: in `counters`, keys that were taken by what came to nothing stay holes; `servers`
changes with time alone.
"""

from __future__ import annotations

from typing import Any

Tables = dict[str, list[tuple[Any, ...]]]

_NAMES = {"postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"}
_SQLITE_NAMES = "SELECT name FROM sqlite_master WHERE type = 'table'"


def dump(db: Any, backend: str) -> Tables:
    """All rows of all tables."""
    names = {name for (name,) in db.execute(_NAMES.get(backend, _SQLITE_NAMES)).fetchall()}
    return {
        name: sorted((tuple(row) for row in db.execute(f"SELECT * FROM {name}").fetchall()), key=repr)
        for name in names - {"counters", "servers"}
    }


def difference(before: Tables, after: Tables) -> dict[str, tuple[list[Any], list[Any]]]:
    """For each table that changed the rows that went and the rows that came."""
    changed = {}
    for name in before.keys() | after.keys():
        old, new = before.get(name, []), after.get(name, [])
        if old != new:
            changed[name] = ([row for row in old if row not in new], [row for row in new if row not in old])
    return changed
