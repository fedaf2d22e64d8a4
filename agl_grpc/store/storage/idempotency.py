"""R13: the same request twice is carried out once and answered twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import StoreError, invalid_field, request_id_reused
from agl_grpc.store.storage.transaction import Redo, Tx

KEEP = 24 * 3600 * SECOND
_MAX_ID = 128
_REPLACE = (
    "DO UPDATE SET request_hash = excluded.request_hash, response = excluded.response, "
    "create_time = excluded.create_time"
)


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Names one logical call.

    Attributes:
        principal: Who calls.
        method: The rpc's name.
        request_id: The caller's key; empty = never deduplicated.
        request: The request's bytes: the same key with others is refused.
    """

    principal: str
    method: str
    request_id: str
    request: bytes


def once(tx: Tx, key: RequestKey, run: Callable[[Tx], bytes]) -> bytes:
    """Runs the change, or answers as it was answered the first time.

    Args:
        tx: The transaction that holds both the change and the key.
        key: The call's name.
        run: Makes the change and returns the serialised response.

    Raises:
        StoreError: INVALID_FIELD for an id over 128 bytes, REQUEST_ID_REUSED for another request.
    """
    if not key.request_id:
        return run(tx)
    if tx.careful:
        response = find(tx, key)
        if response is not None:
            return response
    try:
        response = run(tx)
    except StoreError:
        # The refusal may only be the echo of what the same request did the first time.
        if not tx.careful and find(tx, key) is not None:
            raise Redo from None
        raise
    save_new(tx, key, response)
    return response


def find(tx: Tx, key: RequestKey) -> bytes | None:
    """The answer to the same request before; None = it is new.

    Raises:
        StoreError: As `once`.
    """
    if not key.request_id:
        return None
    if len(key.request_id.encode()) > _MAX_ID:
        raise invalid_field("request_id", f"is longer than {_MAX_ID} bytes")
    row = tx.execute(
        "SELECT request_hash, response FROM requests WHERE digest = ?", (_digest(key),)
    ).fetchone()
    if row is None:
        return None
    if row[0] != _hash(key.request):
        raise request_id_reused(key.request_id)
    return bytes(row[1])


def save_new(tx: Tx, key: RequestKey, response: bytes) -> None:
    """Remembers the answer to a request that was taken for new; raises Redo if it was not."""
    if key.request_id and not _insert(tx, key, response, "DO NOTHING"):
        raise Redo


def save(tx: Tx, key: RequestKey, response: bytes) -> None:
    """Remembers the answer to a request; a later answer to the same one replaces it."""
    if key.request_id:
        _insert(tx, key, response, _REPLACE)


def _insert(tx: Tx, key: RequestKey, response: bytes, otherwise: str) -> bool:
    if len(key.request_id.encode()) > _MAX_ID:
        raise invalid_field("request_id", f"is longer than {_MAX_ID} bytes")
    cursor = tx.execute(
        "INSERT INTO requests (digest, request_hash, response, create_time) VALUES (?, ?, ?, ?) "
        f"ON CONFLICT (digest) {otherwise}",
        (_digest(key), _hash(key.request), response, tx.now),
    )
    return cursor.rowcount > 0


def _digest(key: RequestKey) -> bytes:
    name = "\0".join((key.principal, key.method, key.request_id)).encode()
    return _hash(name)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def prune(tx: Tx, limit: int = 500) -> int:
    """Forgets keys older than 24 hours.

    Returns:
        How many were forgotten; `limit` = there may be more.
    """
    cursor = tx.execute(
        "DELETE FROM requests WHERE request_key IN (SELECT request_key FROM "
        "(SELECT request_key, create_time FROM requests ORDER BY request_key LIMIT ?) AS oldest "
        "WHERE create_time < ?)",
        (limit, tx.now - KEEP),
    )
    return cursor.rowcount
