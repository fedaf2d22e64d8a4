"""What trainers say for people, and what their runs came to."""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE training_log (
    line_key INTEGER PRIMARY KEY AUTOINCREMENT,
    training_key INTEGER NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE INDEX training_log_run ON training_log (training_key, line_key);

CREATE TABLE training_results (
    training_key INTEGER PRIMARY KEY,
    data BLOB NOT NULL
) STRICT;
"""

FAMILY = Family("training_log", (_V1,))
