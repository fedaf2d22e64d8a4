"""Rollouts, attempts, leases, commands to workers.

Every key is an integer. What is large and never changes (the task) stands apart in
`rollout_bodies`, so that a change of state rewrites a short row only. `due` is the earliest
moment at which a timer *may* have to act: heartbeats and renewals move the true moment and leave
`due` alone, the timer then looks again (fewer index writes on the hot path).
"""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE groups (
    group_key INTEGER PRIMARY KEY,
    run_key INTEGER NOT NULL,
    group_id TEXT NOT NULL,
    UNIQUE (run_key, group_id)
) STRICT;

CREATE TABLE label_sets (
    label_set_key INTEGER PRIMARY KEY,
    labels BLOB NOT NULL UNIQUE
) STRICT;

CREATE TABLE rollouts (
    rollout_key INTEGER PRIMARY KEY,
    rollout_id TEXT NOT NULL UNIQUE,
    run_key INTEGER NOT NULL,
    queue_key INTEGER NOT NULL,
    group_key INTEGER,
    label_set_key INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL DEFAULT 0,
    mode INTEGER NOT NULL DEFAULT 0,
    status INTEGER NOT NULL,
    sealed INTEGER NOT NULL DEFAULT 0,
    ready INTEGER NOT NULL DEFAULT 0,
    ready_time INTEGER NOT NULL DEFAULT 0,
    due INTEGER,
    create_time INTEGER NOT NULL,
    end_time INTEGER,
    expire_time INTEGER,
    timeout INTEGER,
    unresponsive INTEGER,
    max_attempts INTEGER NOT NULL,
    retry_mask INTEGER NOT NULL DEFAULT 0,
    max_redeliveries INTEGER NOT NULL,
    backoff INTEGER NOT NULL,
    binding INTEGER NOT NULL DEFAULT 1,
    resource_key INTEGER,
    attempt_count INTEGER NOT NULL DEFAULT 0,
    ended_attempts INTEGER NOT NULL DEFAULT 0,
    redeliveries INTEGER NOT NULL DEFAULT 0,
    latest_attempt_key INTEGER,
    failure_kind INTEGER NOT NULL DEFAULT 0,
    failure BLOB
) STRICT;
CREATE INDEX rollouts_ready ON rollouts (queue_key, priority DESC, rollout_key) WHERE ready = 1;
CREATE INDEX rollouts_due ON rollouts (due) WHERE due IS NOT NULL;
CREATE INDEX rollouts_group ON rollouts (group_key) WHERE group_key IS NOT NULL;
CREATE INDEX rollouts_run ON rollouts (run_key, rollout_key);

CREATE TABLE rollout_bodies (
    rollout_key INTEGER PRIMARY KEY,
    body BLOB NOT NULL
) STRICT;

CREATE TABLE attempts (
    attempt_key INTEGER PRIMARY KEY,
    attempt_id TEXT NOT NULL UNIQUE,
    rollout_key INTEGER NOT NULL,
    run_key INTEGER NOT NULL,
    sequence_id INTEGER NOT NULL,
    status INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    end_time INTEGER,
    worker_key INTEGER,
    session_id TEXT,
    last_heartbeat_time INTEGER,
    timeout INTEGER,
    unresponsive INTEGER,
    leased INTEGER NOT NULL DEFAULT 0,
    lease_token BLOB,
    lease_duration INTEGER,
    lease_expire_time INTEGER,
    lease_lost INTEGER NOT NULL DEFAULT 0,
    open_calls INTEGER NOT NULL DEFAULT 0,
    sealed INTEGER NOT NULL DEFAULT 0,
    seal_time INTEGER,
    seal_due INTEGER,
    capture_incomplete INTEGER NOT NULL DEFAULT 0,
    due INTEGER,
    resource_key INTEGER,
    failure_kind INTEGER NOT NULL DEFAULT 0,
    failure BLOB,
    metadata BLOB
) STRICT;
CREATE UNIQUE INDEX attempts_rollout ON attempts (rollout_key, sequence_id);
CREATE INDEX attempts_due ON attempts (due) WHERE due IS NOT NULL;
CREATE INDEX attempts_leases ON attempts (worker_key) WHERE lease_token IS NOT NULL;

CREATE TABLE worker_commands (
    command_id INTEGER PRIMARY KEY AUTOINCREMENT,
    worker_key INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    attempt_key INTEGER,
    resource_key INTEGER,
    reason TEXT NOT NULL DEFAULT '',
    create_time INTEGER NOT NULL
) STRICT;
CREATE INDEX worker_commands_worker ON worker_commands (worker_key);
"""

_V2 = "ALTER TABLE attempts ADD COLUMN spans_evicted INTEGER NOT NULL DEFAULT 0;"

FAMILY = Family("lifecycle", (_V1, _V2))
