"""Everything that a store's database holds, to compare it before and after.

Only `counters` is left out: keys that were taken by what came to nothing stay holes.
"""

from __future__ import annotations

import re
from typing import Any

from agl_grpc.store.storage.schema import families

Tables = dict[str, list[tuple[Any, ...]]]


def dump(db: Any) -> Tables:
    """All rows of all tables, in the order of their keys."""
    scripts = [script for family in families() for script in family.migrations]
    names = [name for script in scripts for name in re.findall(r"CREATE TABLE (\w+)", script)]
    names.remove("counters")
    return {name: sorted(db.execute(f"SELECT * FROM {name}").fetchall(), key=repr) for name in names}


def difference(before: Tables, after: Tables) -> dict[str, tuple[list[Any], list[Any]]]:
    """For each table that changed the rows that went and the rows that came."""
    changed = {}
    for name in before.keys() | after.keys():
        old, new = before.get(name, []), after.get(name, [])
        if old != new:
            changed[name] = ([row for row in old if row not in new], [row for row in new if row not in old])
    return changed
