"""Training runs, their metrics, batches and checkpoints; policy versions and the engines that serve them."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE training_runs (
    training_key INTEGER PRIMARY KEY,
    training_run_id TEXT NOT NULL UNIQUE,
    run_key INTEGER NOT NULL,
    algorithm TEXT NOT NULL,
    config BLOB,
    status INTEGER NOT NULL,
    trainer_epoch INTEGER NOT NULL DEFAULT 0,
    trainer_id TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    checkpoint_id TEXT NOT NULL DEFAULT '',
    create_time INTEGER NOT NULL,
    end_time INTEGER,
    failure BLOB,
    metadata BLOB
) STRICT;

CREATE TABLE training_metrics (
    metric_key INTEGER PRIMARY KEY AUTOINCREMENT,
    training_key INTEGER NOT NULL,
    step INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (training_key, step)
) STRICT;

CREATE TABLE checkpoints (
    checkpoint_key INTEGER PRIMARY KEY,
    training_key INTEGER NOT NULL,
    checkpoint_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    digest TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    UNIQUE (training_key, checkpoint_id)
) STRICT;

CREATE TABLE batches (
    batch_key INTEGER PRIMARY KEY AUTOINCREMENT,
    batch_id TEXT NOT NULL UNIQUE,
    training_key INTEGER NOT NULL,
    status INTEGER NOT NULL,
    content_hash TEXT NOT NULL,
    trainer_epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    checkpoint_id TEXT NOT NULL DEFAULT '',
    create_time INTEGER NOT NULL,
    commit_time INTEGER
) STRICT;
CREATE INDEX batches_training ON batches (training_key, batch_key);

CREATE TABLE batch_entries (
    batch_key INTEGER NOT NULL,
    place INTEGER NOT NULL,
    rollout_key INTEGER NOT NULL,
    entry BLOB NOT NULL,
    PRIMARY KEY (batch_key, place)
) STRICT, WITHOUT ROWID;
CREATE INDEX batch_entries_rollout ON batch_entries (rollout_key);

CREATE TABLE policy_versions (
    policy_key INTEGER PRIMARY KEY AUTOINCREMENT,
    run_key INTEGER NOT NULL,
    model TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    status INTEGER NOT NULL,
    source BLOB NOT NULL,
    weights_digest TEXT NOT NULL DEFAULT '',
    deadline INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    end_time INTEGER,
    abort_reason TEXT NOT NULL DEFAULT '',
    UNIQUE (run_key, model, policy_version)
) STRICT;
CREATE INDEX policy_versions_due ON policy_versions (deadline) WHERE status = 1;

CREATE TABLE engines (
    engine_key INTEGER PRIMARY KEY,
    engine_id TEXT NOT NULL UNIQUE,
    run_key INTEGER NOT NULL,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    engine_version TEXT NOT NULL,
    active_policy_version INTEGER NOT NULL,
    last_seen_time INTEGER NOT NULL
) STRICT;

CREATE TABLE engine_states (
    policy_key INTEGER NOT NULL,
    engine_id TEXT NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (policy_key, engine_id)
) STRICT, WITHOUT ROWID;
"""

_V2 = """
ALTER TABLE batches ADD COLUMN rules BLOB;
CREATE INDEX batches_hash ON batches (content_hash);
"""

FAMILY = Family("training", (_V1, _V2))
