"""What is stored says what its row says: bodies, spans, manifests and blobs are read and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from agl_grpc.store.spans.check import DELTA, MODEL_CALL, ref_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.training.batches import RELEASED, content_hash
from agl_grpc.store.verify.types import Invariant
from agl_grpc.v1 import batch_pb2, resources_pb2, rollout_pb2, span_pb2

_PAGE = 500


def _pages(db: Connection, sql: str, key: int = 0) -> Iterator[Any]:
    """Rows in the order of their key, a page at a time: `sql` has the last key and the size as parameters."""
    last = -(2**62)
    while rows := db.execute(sql, (last, _PAGE)).fetchall():
        yield from rows
        last = rows[-1][key]


def _parsed(parse: Callable[[bytes], Message], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        return None


def _bodies(db: Connection) -> Iterable[str]:
    sql = (
        "SELECT b.rollout_key, r.rollout_id, u.run_id, b.body FROM rollout_bodies b "
        "JOIN rollouts r ON r.rollout_key = b.rollout_key JOIN runs u ON u.run_key = r.run_key "
        "WHERE b.rollout_key > ? ORDER BY b.rollout_key LIMIT ?"
    )
    for key, rollout_id, run_id, body in _pages(db, sql):
        rollout = _parsed(rollout_pb2.Rollout.FromString, body)
        if rollout is None:
            yield f"the body of rollout {rollout_id} is not a rollout"
        elif (rollout.rollout_id, rollout.run_id) != (rollout_id, run_id):
            yield f"the body of rollout {rollout_id} says {rollout.rollout_id} of run {rollout.run_id}"
        elif rollout.input.blob_digest and not _refers(db, key, rollout.input.blob_digest):
            yield f"rollout {rollout_id} names {rollout.input.blob_digest} without a row in blob_refs"


def _refers(db: Connection, rollout_key: int, digest: str) -> bool:
    row = db.execute(
        "SELECT 1 FROM blob_refs f JOIN blobs b ON b.blob_key = f.blob_key "
        "WHERE f.rollout_key = ? AND b.digest = ?",
        (rollout_key, digest),
    ).fetchone()
    return row is not None


def _publications(db: Connection) -> Iterable[str]:
    sql = (
        "SELECT resource_key, resources_id, version, body FROM resources WHERE resource_key > ? "
        "ORDER BY resource_key LIMIT ?"
    )
    for _, resources_id, version, body in _pages(db, sql):
        found = _parsed(resources_pb2.ResourceSet.FromString, body)
        if found is None or (found.resources_id, found.version) != (resources_id, version):
            yield f"the body of resources {resources_id} version {version} is not theirs"


def _spans(db: Connection) -> Iterable[str]:
    sql = (
        "SELECT span_key, attempt_key, span_ref, flags, prompt_tokens, data FROM spans WHERE span_key > ? "
        "ORDER BY span_key LIMIT ?"
    )
    for key, attempt_key, ref, flags, tokens, data in _pages(db, sql):
        span = _parsed(span_pb2.Span.FromString, data)
        if span is None:
            yield f"span key {key} holds no span"
            continue
        if len(span.span_id) != 8 or ref_of(span.span_id) != ref:
            yield f"span key {key} is stored under {ref:#x}, its bytes say {span.span_id.hex()}"
        if span.HasField("model_call") != bool(flags & MODEL_CALL):
            yield f"span key {key} has flags {flags}, its bytes say otherwise"
        elif flags & MODEL_CALL:
            yield from _prompt(db, key, attempt_key, flags, tokens, span.model_call.prompt)


def _prompt(
    db: Connection, key: int, attempt_key: int, flags: int, tokens: int, prompt: Any
) -> Iterable[str]:
    if bool(prompt.base_span_id) != bool(flags & DELTA):
        yield f"span key {key} has flags {flags}, its prompt says otherwise"
    if prompt.base_length + len(prompt.token_ids) != tokens:
        yield f"span key {key} says {tokens} prompt tokens, its prompt says otherwise"
    if prompt.base_span_id:
        base = db.execute(
            f"SELECT 1 FROM spans WHERE attempt_key = ? AND span_ref = ? AND flags & {MODEL_CALL} <> 0",
            (attempt_key, ref_of(prompt.base_span_id)),
        ).fetchone()
        if base is None:
            yield f"span key {key} builds on {prompt.base_span_id.hex()}, which is not there"


def _manifests(db: Connection) -> Iterable[str]:
    sql = (
        "SELECT batch_key, batch_id, status, content_hash, rules FROM batches WHERE batch_key > ? "
        "ORDER BY batch_key LIMIT ?"
    )
    for key, batch_id, status, stated, rules in _pages(db, sql):
        entries = db.execute(
            "SELECT place, rollout_key, entry FROM batch_entries WHERE batch_key = ? ORDER BY place", (key,)
        ).fetchall()
        if [place for place, _, _ in entries] != list(range(len(entries))):
            yield f"the entries of batch {batch_id} are not numbered from 0 without gaps"
        if content_hash((entry for _, _, entry in entries), rules or b"") != stated:
            yield f"the entries of batch {batch_id} do not have its content hash"
        if status != RELEASED:
            for place, rollout_key, entry in entries:
                yield from _entry(db, f"entry {place} of batch {batch_id}", rollout_key, entry)


def _entry(db: Connection, name: str, rollout_key: int, data: bytes) -> Iterable[str]:
    entry = _parsed(batch_pb2.ManifestEntry.FromString, data)
    if entry is None:
        yield f"{name} is not a manifest entry"
        return
    row = db.execute(
        "SELECT a.attempt_key, a.sealed, r.rollout_id FROM attempts a "
        "JOIN rollouts r ON r.rollout_key = a.rollout_key WHERE a.attempt_id = ? AND a.rollout_key = ?",
        (entry.attempt_id, rollout_key),
    ).fetchone()
    if row is None:
        # Whether the rollout may be gone is what batches.rollouts says.
        if db.execute("SELECT 1 FROM rollouts WHERE rollout_key = ?", (rollout_key,)).fetchone():
            yield f"{name} names attempt {entry.attempt_id}, which its rollout does not have"
        return
    if not row[1] or row[2] != entry.rollout_id:
        yield f"{name} names attempt {entry.attempt_id}, which is not a sealed one of {entry.rollout_id}"
    for span_id in entry.span_ids:
        found = db.execute(
            "SELECT 1 FROM spans WHERE attempt_key = ? AND span_ref = ?", (row[0], ref_of(span_id))
        ).fetchone()
        if found is None:
            yield f"{name} names span {span_id.hex()} of attempt {entry.attempt_id}, which is not there"


def _blobs(db: Connection) -> Iterable[str]:
    sql = (
        "SELECT blob_key, digest FROM blobs WHERE blob_key > ? AND digest IS NOT NULL "
        "ORDER BY blob_key LIMIT ?"
    )
    for key, digest in _pages(db, sql):
        found = hashlib.sha256()
        place = 0
        while row := db.execute(
            "SELECT data FROM blob_pieces WHERE blob_key = ? AND place = ?", (key, place)
        ).fetchone():
            found.update(row[0])
            place += 1
        if f"sha256:{found.hexdigest()}" != digest:
            yield f"the content of blob {digest} has the hash sha256:{found.hexdigest()}"


CONTENTS: tuple[Invariant, ...] = (
    Invariant("rollout_bodies.content", "a rollout's body is the rollout of its row", _bodies, deep=True),
    Invariant(
        "resources.content", "a publication's body is the publication of its row", _publications, deep=True
    ),
    Invariant(
        "spans.content",
        "a span's bytes are the span of its row, and the call that its prompt builds on is there",
        _spans,
        deep=True,
    ),
    Invariant(
        "batches.content",
        "a batch's manifest has its hash and names sealed attempts and spans that are there",
        _manifests,
        deep=True,
    ),
    Invariant("blobs.content", "a blob's content has the hash that names it", _blobs, deep=True),
)
