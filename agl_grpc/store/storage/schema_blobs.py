"""Blobs: large inputs and outputs, stored once under the hash of their content, in pieces of 1 MiB.

`digest` is set when the content is complete; until then nobody sees the blob. A rollout refers to the
blobs that its input and its attempts' outputs name; what nothing refers to is forgotten after a while.
"""

from __future__ import annotations

from agl_grpc.store.storage.schema import Family

_V1 = """
CREATE TABLE blobs (
    blob_key INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT UNIQUE,
    size INTEGER NOT NULL DEFAULT 0,
    put_time INTEGER NOT NULL
) STRICT;

CREATE TABLE blob_pieces (
    piece_key INTEGER PRIMARY KEY,
    blob_key INTEGER NOT NULL,
    place INTEGER NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (blob_key, place)
) STRICT;

CREATE TABLE blob_refs (
    rollout_key INTEGER NOT NULL,
    blob_key INTEGER NOT NULL,
    PRIMARY KEY (rollout_key, blob_key)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_refs_blob ON blob_refs (blob_key);
"""

FAMILY = Family("blobs", (_V1,))
