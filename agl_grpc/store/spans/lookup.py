"""What a transaction of spans has to know before it writes: attempts, and spans that are there already.

One statement for many: each costs a hand-over of the interpreter lock and a walk through the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks, padded

_ATTEMPTS_AT_ONCE = 64
_SPANS_AT_ONCE = 256


class SpanAttempt(NamedTuple):
    """What has to be known of an attempt to store its spans."""

    attempt_id: str
    key: int
    rollout_key: int
    run_key: int
    status: int
    end_time: int | None
    sealed: int
    open_calls: int
    rollout_id: str
    last_sequence: int


def load_attempts(db: Connection, attempt_ids: Sequence[str]) -> dict[str, SpanAttempt]:
    """Those of the attempts that exist, by id."""
    found = {}
    for some in padded(attempt_ids, _ATTEMPTS_AT_ONCE):
        for row in db.execute(_attempts(len(some)), some):
            found[row[0]] = SpanAttempt._make(row)
    return found


def stored_sequences(db: Connection, spans: Sequence[tuple[int, int]]) -> dict[int, dict[int, int]]:
    """Which of the spans, (attempt's key, ref), are stored: their sequence ids by attempt's key and ref."""
    found: dict[int, dict[int, int]] = {}
    for some in padded(spans, _SPANS_AT_ONCE):
        values = [value for span in some for value in span]
        for key, ref, sequence in db.execute(_spans(len(some)), values):
            found.setdefault(key, {})[ref] = sequence
    return found


def distinct(ids: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(ids))


@lru_cache(maxsize=16)
def _attempts(count: int) -> str:
    return (
        "SELECT a.attempt_id, a.attempt_key, a.rollout_key, a.run_key, a.status, a.end_time, a.sealed, "
        "a.open_calls, r.rollout_id, coalesce(s.last, 0) FROM attempts a "
        "JOIN rollouts r ON r.rollout_key = a.rollout_key "
        f"LEFT JOIN span_sequences s ON s.rollout_key = a.rollout_key WHERE a.attempt_id IN ({marks(count)})"
    )


@lru_cache(maxsize=16)
def _spans(count: int) -> str:
    # CROSS JOIN says in which order to join: the few that are looked for, then the index of all spans.
    pairs = ",".join(["(?,?)"] * count)
    return (
        f"SELECT s.attempt_key, s.span_ref, s.sequence_id FROM (VALUES {pairs}) AS v CROSS JOIN spans s "
        "WHERE s.attempt_key = v.column1 AND s.span_ref = v.column2"
    )
