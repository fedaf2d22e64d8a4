"""What `counters` says: one row. It begins with what the tables hold. Made last, after them."""

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

# When the store last came back from being away (R11).
_V2 = "ALTER TABLE counters ADD COLUMN returned INTEGER NOT NULL DEFAULT 0;"

FAMILY = Family("counters", (_V1, _V2))
