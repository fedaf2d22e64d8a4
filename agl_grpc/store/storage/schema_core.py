"""Runs, queues, workers, request ids, the event log."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE runs (
    run_key INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL UNIQUE,
    create_time INTEGER NOT NULL,
    metadata BLOB,
    allow_self_grading INTEGER NOT NULL DEFAULT 0,
    retention INTEGER,
    paused INTEGER NOT NULL DEFAULT 0,
    seal_timeout INTEGER NOT NULL DEFAULT 60000000
) STRICT;

CREATE TABLE queues (
    queue_key INTEGER PRIMARY KEY,
    run_key INTEGER NOT NULL,
    name TEXT NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0,
    UNIQUE (run_key, name)
) STRICT;

CREATE TABLE workers (
    worker_key INTEGER PRIMARY KEY,
    worker_id TEXT NOT NULL UNIQUE,
    status INTEGER NOT NULL DEFAULT 0,
    stats BLOB,
    idle_reason TEXT NOT NULL DEFAULT '',
    queues BLOB,
    last_heartbeat_time INTEGER,
    last_dequeue_time INTEGER,
    last_busy_time INTEGER,
    last_idle_time INTEGER,
    current_attempt_key INTEGER
) STRICT;

CREATE TABLE requests (
    request_key INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    request_hash BLOB NOT NULL,
    response BLOB NOT NULL,
    create_time INTEGER NOT NULL
) STRICT;

CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    run_key INTEGER NOT NULL,
    entity INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    ref INTEGER NOT NULL,
    low INTEGER NOT NULL DEFAULT 0,
    high INTEGER NOT NULL DEFAULT 0,
    time INTEGER NOT NULL,
    entity_id TEXT
) STRICT;
"""

_V2 = "ALTER TABLE runs ADD COLUMN replay_retention INTEGER;"

# Which lease stream of a worker is its newest: of several servers, the others' streams are fenced by it.
_V3 = """
ALTER TABLE workers ADD COLUMN stream_session TEXT;
ALTER TABLE workers ADD COLUMN stream_epoch INTEGER NOT NULL DEFAULT 0;
"""

# Graders that the run waits for (a serialised Run with only them), and for how long.
_V4 = """
ALTER TABLE runs ADD COLUMN graders BLOB;
ALTER TABLE runs ADD COLUMN grading_timeout INTEGER NOT NULL DEFAULT 600000000;
"""

FAMILY = Family("core", (_V1, _V2, _V3, _V4))
