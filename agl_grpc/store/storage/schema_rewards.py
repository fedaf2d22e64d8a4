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

FAMILY = Family("rewards", (_V1,))
