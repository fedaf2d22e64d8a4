"""R13: the same request twice is carried out once and answered twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import StoreError, request_id_reused
from agl_grpc.store.storage.bulk import Execute, update_rows
from agl_grpc.store.storage.transaction import Answered, Redo, Tx

KEEP = 24 * 3600 * SECOND
_INSERT = (
    "INSERT INTO requests (digest, request_hash, response, create_time) VALUES {rows} "
    "ON CONFLICT (digest) DO "
)
_REPLACE = _INSERT + (
    "UPDATE SET request_hash = excluded.request_hash, response = excluded.response, "
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
    digest = _digest(key)
    row = tx.answered.get(digest) or _stored(tx, digest)
    if row is None:
        return None
    if row.request_hash != _hash(key.request):
        raise request_id_reused(key.request_id)
    return row.response


def _stored(tx: Tx, digest: bytes) -> Answered | None:
    row = tx.execute("SELECT request_hash, response FROM requests WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else Answered(bytes(row[0]), bytes(row[1]), tx.now, replaces=False)


def save_new(tx: Tx, key: RequestKey, response: bytes) -> None:
    """Remembers the answer to a request that was taken for new; raises Redo if one of the group is the same.

    One of an earlier group is found when the group's answers are written.
    """
    if key.request_id and _note(tx, key, response, replaces=False):
        raise Redo


def save(tx: Tx, key: RequestKey, response: bytes) -> None:
    """Remembers the answer to a request; a later answer to the same one replaces it."""
    if key.request_id:
        _note(tx, key, response, replaces=True)


def _note(tx: Tx, key: RequestKey, response: bytes, *, replaces: bool) -> bool:
    """Remembers an answer until the group's are written; returns whether there was one in the group."""
    digest, answered = _digest(key), tx.answered
    before = answered.get(digest)
    answered[digest] = Answered(_hash(key.request), response, tx.now, replaces)

    def undo() -> None:
        del answered[digest]
        if before is not None:
            answered[digest] = before

    tx.after_rollback(undo)
    return before is not None


def write_answers(execute: Execute, answered: Iterable[tuple[bytes, Answered]]) -> bool:
    """Writes the answers of a group of commands; False = one of its requests was answered before."""
    new: list[tuple[object, ...]] = []
    again: list[tuple[object, ...]] = []
    for digest, one in answered:
        row = (digest, one.request_hash, one.response, one.create_time)
        (again if one.replaces else new).append(row)
    update_rows(execute, _REPLACE, again)
    return update_rows(execute, _INSERT + "NOTHING", new) == len(new)


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
