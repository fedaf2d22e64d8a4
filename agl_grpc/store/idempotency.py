"""R13: the same request twice is carried out once and answered twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import invalid_field, request_id_reused
from agl_grpc.store.transaction import Tx

KEEP = 24 * 3600 * SECOND
_MAX_ID = 128


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
    if len(key.request_id.encode()) > _MAX_ID:
        raise invalid_field("request_id", f"is longer than {_MAX_ID} bytes")
    name = "\0".join((key.principal, key.method, key.request_id)).encode()
    digest = blake2b(name, digest_size=16).digest()
    request_hash = blake2b(key.request, digest_size=16).digest()
    row = tx.execute("SELECT request_hash, response FROM requests WHERE digest = ?", (digest,)).fetchone()
    if row is not None:
        if row[0] != request_hash:
            raise request_id_reused(key.request_id)
        return bytes(row[1])
    response = run(tx)
    tx.execute(
        "INSERT INTO requests (digest, request_hash, response, create_time) VALUES (?, ?, ?, ?)",
        (digest, request_hash, response, tx.now),
    )
    return response


def prune(tx: Tx, limit: int = 500) -> int:
    """Forgets keys older than 24 hours.

    Returns:
        How many were forgotten; `limit` = there may be more.
    """
    cursor = tx.execute(
        "DELETE FROM requests WHERE request_key IN (SELECT request_key FROM "
        "(SELECT request_key, create_time FROM requests ORDER BY request_key LIMIT ?) WHERE create_time < ?)",
        (limit, tx.now - KEEP),
    )
    return cursor.rowcount
