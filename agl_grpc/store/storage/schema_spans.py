"""Spans as they arrived, what is known of their producers, model calls under way.

`span_ref` is the span's 8-byte id as a signed integer: with the attempt's key it is the natural key.
"""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE spans (
    span_key INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_key INTEGER NOT NULL,
    span_ref INTEGER NOT NULL,
    sequence_id INTEGER NOT NULL,
    received_time INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX spans_natural ON spans (attempt_key, span_ref);

CREATE TABLE span_sequences (
    rollout_key INTEGER PRIMARY KEY,
    last INTEGER NOT NULL
) STRICT;

CREATE TABLE span_totals (
    run_key INTEGER PRIMARY KEY,
    spans INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    late INTEGER NOT NULL
) STRICT;

CREATE TABLE open_calls (
    attempt_key INTEGER NOT NULL,
    span_ref INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    PRIMARY KEY (attempt_key, span_ref)
) STRICT, WITHOUT ROWID;

CREATE TABLE span_producers (
    producer_key INTEGER PRIMARY KEY,
    producer_id TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    last_sequence INTEGER NOT NULL,
    update_time INTEGER NOT NULL
) STRICT;
"""

FAMILY = Family("spans", (_V1,))
