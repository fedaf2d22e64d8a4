"""Rows of rollouts and attempts as the rules see them. All times in microseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from agl_grpc.store.errors import not_found, spans_evicted
from agl_grpc.store.rollouts.lifecycle import Clocks, Rules
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks, padded


class RolloutRow(NamedTuple):
    """The part of a rollout that changes or that rules depend on."""

    key: int
    rollout_id: str
    run_key: int
    queue_key: int
    label_set_key: int
    status: int
    sealed: int
    ready: int
    ready_time: int
    due: int | None
    expire_time: int | None
    timeout: int | None
    unresponsive: int | None
    max_attempts: int
    retry_mask: int
    max_redeliveries: int
    backoff: int
    ended_attempts: int
    redeliveries: int
    attempt_count: int
    latest_attempt_key: int | None
    resource_key: int | None

    @property
    def rules(self) -> Rules:
        """What `judge` needs."""
        return Rules(
            self.max_attempts,
            self.retry_mask,
            self.max_redeliveries,
            self.backoff,
            self.ended_attempts,
            self.redeliveries,
        )


class AttemptRow(NamedTuple):
    """The part of an attempt that changes or that rules depend on."""

    key: int
    attempt_id: str
    rollout_key: int
    run_key: int
    sequence_id: int
    status: int
    start_time: int
    worker_key: int | None
    session_id: str | None
    last_heartbeat: int | None
    timeout: int | None
    unresponsive: int | None
    leased: int
    lease_token: bytes | None
    lease_duration: int | None
    lease_expire: int | None
    open_calls: int
    sealed: int
    seal_due: int | None
    due: int | None

    @property
    def clocks(self) -> Clocks:
        """What runs on it."""
        return Clocks(
            self.start_time,
            self.last_heartbeat,
            self.timeout,
            self.unresponsive,
            self.lease_expire,
            self.seal_due,
        )


def _columns(select: str, table: str) -> str:
    names = select.removeprefix("SELECT ").split(" FROM ")[0].split(", ")
    return ", ".join(f"{table}.{name}" for name in names)


_ROLLOUT = (
    "SELECT rollout_key, rollout_id, run_key, queue_key, label_set_key, status, sealed, ready, "
    "ready_time, due, "
    "expire_time, timeout, unresponsive, max_attempts, retry_mask, max_redeliveries, backoff, "
    "ended_attempts, "
    "redeliveries, attempt_count, latest_attempt_key, resource_key FROM rollouts "
)
_ATTEMPT = (
    "SELECT attempt_key, attempt_id, rollout_key, run_key, sequence_id, status, start_time, worker_key, "
    "session_id, last_heartbeat_time, timeout, unresponsive, leased, lease_token, lease_duration, "
    "lease_expire_time, open_calls, sealed, seal_due, due FROM attempts "
)
_READY = (
    _ROLLOUT.removesuffix(" FROM rollouts ")
    + ", priority, (SELECT body FROM rollout_bodies b WHERE b.rollout_key = rollouts.rollout_key) "
    "FROM rollouts WHERE queue_key = ? AND ready = 1 "
)
_BOTH = (
    "SELECT " + _columns(_ATTEMPT, "a") + ", " + _columns(_ROLLOUT, "r") + " FROM attempts a "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key "
)
_BOTH_BY_KEY = _BOTH + "WHERE a.attempt_key = ?"
_ROLLOUT_BY_KEY = _ROLLOUT + "WHERE rollout_key = ?"
_ROLLOUT_BY_ID = _ROLLOUT + "WHERE rollout_id = ?"
_ATTEMPT_BY_KEY = _ATTEMPT + "WHERE attempt_key = ?"
_ATTEMPT_BY_ID = _ATTEMPT + "WHERE attempt_id = ?"


_AT_ONCE = 256


def rollout_by_key(db: Connection, key: int) -> RolloutRow:
    """A rollout that exists."""
    return RolloutRow._make(db.execute(_ROLLOUT_BY_KEY, (key,)).fetchone())


def rollout_by_id(db: Connection, rollout_id: str) -> RolloutRow:
    """A rollout by its id.

    Raises:
        StoreError: NOT_FOUND.
    """
    row = db.execute(_ROLLOUT_BY_ID, (rollout_id,)).fetchone()
    if row is None:
        raise not_found("rollout", rollout_id)
    return RolloutRow._make(row)


class Ready(NamedTuple):
    """A rollout that can be delivered, with its unchanging part as serialised Rollout."""

    row: RolloutRow
    priority: int
    body: bytes


def ready_rollouts(
    db: Connection, queue_key: int, label_sets: Iterable[int] | None, limit: int, after: int = 0
) -> list[Ready]:
    """The head of a queue: rollouts that can be delivered, most urgent first.

    Args:
        db: The connection.
        queue_key: The queue.
        label_sets: Only rollouts with one of these sets of labels; None = any.
        limit: At most so many.
        after: Without the first so many.
    """
    allowed = "" if label_sets is None else f"AND label_set_key IN ({','.join(map(str, label_sets))}) "
    rows = db.execute(
        f"{_READY}{allowed}ORDER BY priority DESC, rollout_key LIMIT ? OFFSET ?", (queue_key, limit, after)
    ).fetchall()
    return [Ready(RolloutRow._make(row[:-2]), row[-2], row[-1]) for row in rows]


def rollouts_where(db: Connection, where: str, *values: object) -> list[RolloutRow]:
    """Rollouts by a condition of this package's own making."""
    return [RolloutRow._make(row) for row in db.execute(_ROLLOUT + where, values)]


def ids_of(db: Connection, keys: Sequence[int]) -> list[str]:
    """Ids of those of the rollouts that exist, in order of their keys; not too many at once."""
    where = f"WHERE rollout_key IN ({marks(len(keys))}) ORDER BY rollout_key"
    return [rollout_id for (rollout_id,) in db.execute(f"SELECT rollout_id FROM rollouts {where}", keys)]


def attempt_by_key(db: Connection, key: int) -> AttemptRow:
    """An attempt that exists."""
    return AttemptRow._make(db.execute(_ATTEMPT_BY_KEY, (key,)).fetchone())


def find_attempt(db: Connection, attempt_id: str) -> AttemptRow | None:
    """An attempt by its id; None = there is none."""
    row = db.execute(_ATTEMPT_BY_ID, (attempt_id,)).fetchone()
    return None if row is None else AttemptRow._make(row)


def find_attempts(db: Connection, attempt_ids: Sequence[str]) -> dict[str, AttemptRow]:
    """Those of the attempts that exist, by id, in the order given."""
    found: dict[str, AttemptRow] = {}
    for part in padded(attempt_ids, _AT_ONCE):
        for attempt in attempts_where(db, f"WHERE attempt_id IN ({marks(len(part))})", *part):
            found[attempt.attempt_id] = attempt
    return {one: found[one] for one in attempt_ids if one in found}


def find_pairs(db: Connection, attempt_ids: Sequence[str]) -> dict[str, tuple[AttemptRow, RolloutRow]]:
    """Those of the attempts that exist, with their rollouts, by id."""
    found = {}
    for part in padded(attempt_ids, _AT_ONCE):
        for row in db.execute(f"{_BOTH}WHERE a.attempt_id IN ({marks(len(part))})", part):
            pair = _split(row)
            found[pair[0].attempt_id] = pair
    return found


def both_by_key(db: Connection, attempt_key: int) -> tuple[AttemptRow, RolloutRow]:
    """An attempt that exists, and its rollout."""
    return _split(db.execute(_BOTH_BY_KEY, (attempt_key,)).fetchone())


def _split(row: tuple[Any, ...]) -> tuple[AttemptRow, RolloutRow]:
    width = len(AttemptRow._fields)
    return AttemptRow._make(row[:width]), RolloutRow._make(row[width:])


def attempt_by_name(db: Connection, rollout_id: str, attempt_id: str) -> AttemptRow:
    """An attempt by its id, or `latest` of a rollout; a rollout that is named must be the attempt's.

    Raises:
        StoreError: NOT_FOUND.
    """
    if attempt_id == "latest":
        key = rollout_by_id(db, rollout_id).latest_attempt_key
        if key is None:
            raise not_found("attempt", f"{rollout_id}/latest")
        return attempt_by_key(db, key)
    attempt = find_attempt(db, attempt_id)
    if attempt is None or (rollout_id and rollout_by_id(db, rollout_id).key != attempt.rollout_key):
        raise not_found("attempt", attempt_id)
    return attempt


def attempts_by_name(db: Connection, names: Sequence[tuple[str, str]]) -> list[tuple[AttemptRow, RolloutRow]]:
    """As `attempt_by_name`, for many, each with its rollout: (rollout's id, attempt's id or `latest`).

    Raises:
        StoreError: NOT_FOUND.
    """
    pairs = find_pairs(db, list(dict.fromkeys(attempt_id for _, attempt_id in names)))
    found = []
    for rollout_id, attempt_id in names:
        pair = pairs.get(attempt_id)
        if attempt_id == "latest" or pair is None or rollout_id not in ("", pair[1].rollout_id):
            # The rare and the wrong ones one by one: they know what to say.
            attempt = attempt_by_name(db, rollout_id, attempt_id)
            pair = attempt, rollout_by_key(db, attempt.rollout_key)
        found.append(pair)
    return found


def refuse_evicted(db: Connection, attempt_keys: Sequence[int]) -> None:
    """Checks that the spans of these attempts are still there.

    Raises:
        StoreError: SPANS_EVICTED.
    """
    row = db.execute(
        "SELECT attempt_id FROM attempts WHERE spans_evicted = 1 AND "
        f"attempt_key IN ({marks(len(attempt_keys))}) LIMIT 1",
        list(attempt_keys),
    ).fetchone()
    if row is not None:
        raise spans_evicted(row[0])


def attempts_where(db: Connection, where: str, *values: object) -> list[AttemptRow]:
    """Attempts by a condition of this package's own making."""
    return [AttemptRow._make(row) for row in db.execute(_ATTEMPT + where, values)]


def queues_with_work(db: Connection, queue_keys: Sequence[int]) -> list[int]:
    """Those of the queues that have a rollout which can be delivered now."""
    rows = db.execute(
        f"SELECT queue_key FROM queues WHERE queue_key IN ({marks(len(queue_keys))}) AND EXISTS "
        "(SELECT 1 FROM rollouts WHERE rollouts.queue_key = queues.queue_key AND ready = 1)",
        queue_keys,
    )
    return [key for (key,) in rows]


def next_attempt_due(db: Connection) -> int | None:
    """When a timer may have to act on an attempt; None = on none."""
    return _least(db, "SELECT min(due) FROM attempts WHERE due IS NOT NULL")


def next_rollout_due(db: Connection) -> int | None:
    """When a timer may have to act on a waiting rollout; None = on none."""
    return _least(db, "SELECT min(due) FROM rollouts WHERE due IS NOT NULL")


def _least(db: Connection, sql: str) -> int | None:
    (least,) = db.execute(sql).fetchone()
    return None if least is None else int(least)
