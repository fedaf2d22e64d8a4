"""Blobs: content under its own hash, in pieces, kept while a rollout refers to it (R32)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import common_pb2

PIECE_BYTES = 1 << 20
"""Every piece but a blob's last has so many bytes."""

KEEP = 24 * 3600 * SECOND
"""How long a blob that nothing refers to is kept after it was put."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PRUNE_PIECES = 64


class Blob(NamedTuple):
    """A blob that is there."""

    key: int
    size: int


def check_digest(digest: str, path: str) -> None:
    """Refuses what is not `sha256:<64 hex digits>`.

    Raises:
        StoreError: INVALID_FIELD.
    """
    if _DIGEST.fullmatch(digest) is None:
        raise invalid_field(path, "must be `sha256:` and 64 lower-case hex digits")


def find(db: Connection, digest: str) -> Blob | None:
    """A complete blob; None = there is none."""
    row = db.execute("SELECT blob_key, size FROM blobs WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else Blob._make(row)


def require(db: Connection, digest: str) -> Blob:
    """A complete blob.

    Raises:
        StoreError: NOT_FOUND.
    """
    found = find(db, digest)
    if found is None:
        raise not_found("blob", digest)
    return found


def touch(tx: Tx, digest: str) -> Blob | None:
    """A blob that is put again is kept as if it were new; None = there is none."""
    found = find(tx.connection, digest)
    if found is not None:
        tx.execute("UPDATE blobs SET put_time = ? WHERE blob_key = ?", (tx.now, found.key))
    return found


def begin(tx: Tx) -> int:
    """A blob whose content is on its way; returns its key."""
    (key,) = tx.execute("INSERT INTO blobs (put_time) VALUES (?) RETURNING blob_key", (tx.now,)).fetchone()
    return int(key)


def add_piece(tx: Tx, blob_key: int, place: int, data: bytes) -> None:
    """The next piece of a blob on its way."""
    tx.execute("INSERT INTO blob_pieces (blob_key, place, data) VALUES (?, ?, ?)", (blob_key, place, data))


def finish(tx: Tx, blob_key: int, digest: str, size: int) -> None:
    """Makes a blob visible; if another upload of the same content was quicker, this one goes."""
    if touch(tx, digest) is not None:
        discard(tx, blob_key)
        return
    tx.execute("UPDATE blobs SET digest = ?, size = ? WHERE blob_key = ?", (digest, size, blob_key))


def discard(tx: Tx, blob_key: int) -> None:
    """Deletes a blob with its pieces."""
    tx.execute("DELETE FROM blob_pieces WHERE blob_key = ?", (blob_key,))
    tx.execute("DELETE FROM blobs WHERE blob_key = ?", (blob_key,))


def piece(db: Connection, blob_key: int, place: int) -> bytes | None:
    """A piece of a blob; None = it is gone."""
    row = db.execute(
        "SELECT data FROM blob_pieces WHERE blob_key = ? AND place = ?", (blob_key, place)
    ).fetchone()
    return None if row is None else bytes(row[0])


def refer(tx: Tx, rollout_key: int, payload: common_pb2.Payload, path: str) -> None:
    """Notes that a rollout needs the blob that a payload names, if it names one.

    Raises:
        StoreError: INVALID_FIELD, or NOT_FOUND when the blob is not there.
    """
    if payload.WhichOneof("content") != "blob_digest":
        return
    check_digest(payload.blob_digest, f"{path}.blob_digest")
    tx.execute(
        "INSERT INTO blob_refs (rollout_key, blob_key) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (rollout_key, require(tx.connection, payload.blob_digest).key),
    )


def forget_refs(tx: Tx, rollout_key: int, _attempt_keys: Iterable[int]) -> None:
    """A rollout is deleted: it needs its blobs no more."""
    tx.execute("DELETE FROM blob_refs WHERE rollout_key = ?", (rollout_key,))


def prune(tx: Tx, limit: int) -> int:
    """Forgets blobs, half-sent ones too, that nothing refers to and nobody has put for 24 hours.

    Returns:
        How many were forgotten; `limit` = there may be more.
    """
    keys = tx.execute(
        "SELECT b.blob_key FROM blobs b WHERE b.put_time < ? AND NOT EXISTS "
        "(SELECT 1 FROM blob_refs f WHERE f.blob_key = b.blob_key) LIMIT ?",
        (tx.now - KEEP, limit),
    ).fetchall()
    pieces = 0
    for count, (key,) in enumerate(keys, start=1):
        (held,) = tx.execute("SELECT count(*) FROM blob_pieces WHERE blob_key = ?", (key,)).fetchone()
        discard(tx, key)
        pieces += held
        # A transaction stays short however large the blobs are.
        if pieces >= _PRUNE_PIECES and count < len(keys):
            return limit
    return len(keys)
