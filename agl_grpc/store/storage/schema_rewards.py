"""Rewards: every revision stays, the largest counts. No target = 0, no step = -1."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE rewards (
    reward_key INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_key INTEGER NOT NULL,
    name TEXT NOT NULL,
    target_ref INTEGER NOT NULL,
    step INTEGER NOT NULL,
    grader TEXT NOT NULL,
    revision INTEGER NOT NULL,
    value REAL NOT NULL,
    create_time INTEGER NOT NULL,
    metadata BLOB
) STRICT;
CREATE UNIQUE INDEX rewards_natural ON rewards (attempt_key, name, target_ref, step, grader, revision);
"""

# A grader's failure has no value: `value` is then 0 and never read. Attempts that wait for their graders
# stand in `gradings`, with the moment at which the wait is over.
_V2 = """
ALTER TABLE rewards ADD COLUMN failure BLOB;
ALTER TABLE rewards ADD COLUMN grader_version TEXT NOT NULL DEFAULT '';

CREATE TABLE gradings (
    attempt_key INTEGER PRIMARY KEY,
    run_key INTEGER NOT NULL,
    due INTEGER NOT NULL
) STRICT;
CREATE INDEX gradings_due ON gradings (due);
CREATE INDEX gradings_run ON gradings (run_key);
"""

FAMILY = Family("rewards", (_V1, _V2))
