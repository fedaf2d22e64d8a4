"""The newest keys given out: one row. It begins with what the tables hold. Made last, after them."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE counters (
    rollouts INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    spans INTEGER NOT NULL,
    events INTEGER NOT NULL,
    catalog INTEGER NOT NULL,
    beat INTEGER NOT NULL
) STRICT;
INSERT INTO counters (rollouts, attempts, spans, events, catalog, beat) SELECT
    coalesce((SELECT max(rollout_key) FROM rollouts), 0),
    coalesce((SELECT max(attempt_key) FROM attempts), 0),
    coalesce((SELECT max(span_key) FROM spans), 0),
    coalesce((SELECT max(position) FROM events), 0), 0, 0;
"""

FAMILY = Family("counters", (_V1,))
