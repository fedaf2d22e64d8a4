"""Databases that are large from the start, and SQLite alone as a peer."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from agl_grpc.store.storage.counters import NAMES
from agl_grpc.v1 import rollout_pb2
from agl_grpc.v1 import store_service_pb2 as store
from benchmarks.messages import SPAN_BYTES, Attempt, Calls, plain_span
from benchmarks.servers import store_server

ATTEMPTS = 512
_AT_ONCE = 20_000


async def make_attempts(address: str, count: int = ATTEMPTS) -> list[Attempt]:
    """Live attempts to write to."""
    calls = Calls(address, False)
    request = store.StartRolloutRequest(rollout=rollout_pb2.RolloutSpec())
    answers = await asyncio.gather(*(calls.start(request) for _ in range(count)))
    await calls.channel.close()
    return [(one.rollout.rollout.rollout_id, one.rollout.attempt.attempt_id) for one in answers]


def grown(path: Path | str, rows: int, attempts: int = ATTEMPTS) -> list[Attempt]:
    """Makes a database with so many spans, of live attempts in turn; returns the attempts.

    The store makes the schema and the attempts. The rows go in directly, without waiting for the disk; they
    are what the store would have written, so that it goes on from there.
    """
    with store_server(path) as server:
        made = asyncio.run(make_attempts(server.address, attempts))
    if rows:
        _fill(Path(path), rows, made)
    return made


def _fill(path: Path, rows: int, made: list[Attempt]) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = DELETE", "synchronous = OFF", "cache_size = -262144"):
        db.execute(f"PRAGMA {pragma}")
    db.execute("BEGIN")
    index = "SELECT sql FROM sqlite_master WHERE name = 'spans_natural'"
    (create,) = db.execute(index).fetchone()
    db.execute("DROP INDEX spans_natural")
    keys = [key for (key,) in db.execute("SELECT attempt_key FROM attempts ORDER BY attempt_key")]
    for start in range(0, rows, _AT_ONCE):
        count = min(_AT_ONCE, rows - start)
        db.executemany("INSERT INTO spans VALUES (?, ?, ?, ?, ?, 0, 0, ?)", _rows(start, count, keys))
    db.execute(create)
    each = rows // len(keys) + 1
    db.executemany(
        "INSERT INTO span_sequences SELECT rollout_key, ? FROM attempts WHERE attempt_key = ?",
        [(each, key) for key in keys],
    )
    db.execute("INSERT INTO span_totals SELECT run_key, ?, ?, 0 FROM runs LIMIT 1", (rows, rows * SPAN_BYTES))
    assert "spans" in NAMES
    db.execute("UPDATE counters SET spans = ?", (rows,))
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


def _rows(start: int, count: int, keys: list[int]) -> Iterator[tuple[object, ...]]:
    now, data = time.time_ns() // 1000, plain_span(span_id=bytes(range(1, 9))).SerializeToString()
    place = data.index(bytes(range(1, 9)))
    before, after = data[:place], data[place + 8 :]
    for number in range(start, start + count):
        # A few spans of one attempt after the other, as messages bring them.
        key, span_id = keys[number // 100 % len(keys)], os.urandom(8)
        ref = int.from_bytes(span_id, "big", signed=True)
        sequence = number // (100 * len(keys)) * 100 + number % 100 + 1
        yield (number + 1, key, ref, sequence, now, before + span_id + after)


def sqlite_alone(path: Path, seconds: float, groups: int = 1) -> float:
    """Rows a second of SQLite with the same rows, index and durability, 1000 a transaction, one thread.

    Args:
        path: A file that is not there yet, or a store's, of which no server has any more use.
        seconds: How long rows are written.
        groups: Attempts of which a hundred rows that follow each other are.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in (
        "page_size = 8192",
        "journal_mode = WAL",
        "synchronous = FULL",
        "wal_autocheckpoint = 8000",
    ):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS spans (span_key INTEGER PRIMARY KEY, attempt_key INTEGER, "
        "span_ref INTEGER, sequence INTEGER, received INTEGER, flags INTEGER, prompt INTEGER, data BLOB)"
    )
    connection.execute("CREATE UNIQUE INDEX IF NOT EXISTS spans_natural ON spans (attempt_key, span_ref)")
    data, count, begin = os.urandom(SPAN_BYTES), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(10):
            some = random.sample(range(1, ATTEMPTS + 1), groups)
            rows = [(some[n % groups], random.getrandbits(62), count + n, 1, 0, 0, data) for n in range(100)]
            connection.executemany("INSERT INTO spans VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
            count += 100
        connection.execute("COMMIT")
    took = time.perf_counter() - begin
    connection.close()
    return count / took
