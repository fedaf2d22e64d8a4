"""Published resources. Keys rise in commit order: the largest of a run is its latest."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE resources (
    resource_key INTEGER PRIMARY KEY,
    run_key INTEGER NOT NULL,
    resources_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    update_time INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (resources_id, version)
) STRICT;
CREATE INDEX resources_by_run ON resources (run_key, resource_key);
"""

FAMILY = Family("resources", (_V1,))
