"""Policy versions: offered, staged by engines, committed or aborted before a deadline; the engines."""

from __future__ import annotations

from typing import NamedTuple

from agl_grpc.store.errors import illegal_transition, invalid_field, not_found, weights_rejected
from agl_grpc.store.events.timers import FIRE_LIMIT
from agl_grpc.store.rollouts.encode import set_time
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2, policy_pb2

POLICY_VERSION = event_pb2.ENTITY_KIND_POLICY_VERSION
PREPARING = int(policy_pb2.POLICY_VERSION_STATUS_PREPARING)
COMMITTED = int(policy_pb2.POLICY_VERSION_STATUS_COMMITTED)
ABORTED = int(policy_pb2.POLICY_VERSION_STATUS_ABORTED)
_NAMES = {PREPARING: "preparing", COMMITTED: "committed", ABORTED: "aborted"}
_STAGED = frozenset({int(policy_pb2.ENGINE_PHASE_RECEIVED), int(policy_pb2.ENGINE_PHASE_ACTIVE)})


class PolicyRow(NamedTuple):
    """The part of a policy version that rules depend on."""

    key: int
    run_key: int
    model: str
    policy_version: int
    status: int
    weights_digest: str


_SELECT = "SELECT policy_key, run_key, model, policy_version, status, weights_digest FROM policy_versions "


def find_policy(db: Connection, run_key: int, model: str, version: int) -> PolicyRow | None:
    """A policy version; None = there is none."""
    row = db.execute(
        f"{_SELECT}WHERE run_key = ? AND model = ? AND policy_version = ?", (run_key, model, version)
    ).fetchone()
    return None if row is None else PolicyRow._make(row)


def policy_by_version(db: Connection, run_key: int, model: str, version: int) -> PolicyRow:
    """A policy version.

    Raises:
        StoreError: NOT_FOUND.
    """
    row = find_policy(db, run_key, model, version)
    if row is None:
        raise not_found("policy version", f"{model}/{version}")
    return row


def newest_committed(db: Connection, run_key: int, model: str) -> PolicyRow | None:
    """The newest committed version of a model; None = none is."""
    row = db.execute(
        f"{_SELECT}WHERE run_key = ? AND model = ? AND status = ? ORDER BY policy_version DESC LIMIT 1",
        (run_key, model, COMMITTED),
    ).fetchone()
    return None if row is None else PolicyRow._make(row)


def prepare(
    tx: Tx, run_key: int, model: str, version: int, source: policy_pb2.WeightSource, seconds: float
) -> int:
    """Offer weights; a version of the model that is still being prepared is given up. Returns the key.

    Raises:
        StoreError: INVALID_FIELD, or ILLEGAL_TRANSITION when a newer version (or this one) is committed.
    """
    if not model:
        raise invalid_field("model", "must not be empty")
    newest = newest_committed(tx.connection, run_key, model)
    if newest is not None and version <= newest.policy_version:
        after = f"committed at {newest.policy_version}"
        raise illegal_transition("policy version", f"{model}/{version}", after, "preparing")
    for row in _preparing(tx, run_key, model):
        if row.policy_version != version:
            abort(tx, row, f"replaced by version {version}")
    deadline = tx.now + int(seconds * 1e6)
    tx.arm(deadline)
    known = find_policy(tx.connection, run_key, model, version)
    if known is None:
        key = tx.insert(
            "INSERT INTO policy_versions (run_key, model, policy_version, status, source, deadline, "
            "create_time) VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING policy_key",
            (run_key, model, version, PREPARING, source.SerializeToString(), deadline, tx.now),
        )
        tx.event(run_key, POLICY_VERSION, event_pb2.EVENT_KIND_CREATED, key)
        return key
    # An aborted version, or one whose trainer was replaced, is offered anew.
    tx.execute("DELETE FROM engine_states WHERE policy_key = ?", (known.key,))
    tx.execute(
        "UPDATE policy_versions SET status = ?, source = ?, weights_digest = '', deadline = ?, "
        "create_time = ?, end_time = NULL, abort_reason = '' WHERE policy_key = ?",
        (PREPARING, source.SerializeToString(), deadline, tx.now, known.key),
    )
    tx.event(run_key, POLICY_VERSION, event_pb2.EVENT_KIND_UPDATED, known.key)
    return known.key


def _preparing(tx: Tx, run_key: int, model: str) -> list[PolicyRow]:
    rows = tx.execute(f"{_SELECT}WHERE run_key = ? AND model = ? AND status = ?", (run_key, model, PREPARING))
    return [PolicyRow._make(row) for row in rows.fetchall()]


def commit(tx: Tx, row: PolicyRow, digest: str) -> None:
    """Let engines swap the weights in.

    Raises:
        StoreError: ILLEGAL_TRANSITION, or WEIGHTS_REJECTED when a required engine holds something else.
    """
    if row.status == COMMITTED and row.weights_digest == digest:
        return
    if row.status != PREPARING:
        name = f"{row.model}/{row.policy_version}"
        raise illegal_transition("policy version", name, _NAMES[row.status], "committed")
    (source,) = tx.execute("SELECT source FROM policy_versions WHERE policy_key = ?", (row.key,)).fetchone()
    states = {state.engine_id: state for state in load_states(tx.connection, row.key)}
    for engine_id in policy_pb2.WeightSource.FromString(source).engine_ids:
        _check_staged(engine_id, states.get(engine_id), digest)
    tx.execute(
        "UPDATE policy_versions SET status = ?, weights_digest = ?, end_time = ? WHERE policy_key = ?",
        (COMMITTED, digest, tx.now, row.key),
    )
    tx.event(row.run_key, POLICY_VERSION, event_pb2.EVENT_KIND_TERMINAL, row.key)


def _check_staged(engine_id: str, state: policy_pb2.EngineState | None, digest: str) -> None:
    if state is None or state.phase not in _STAGED:
        phase = "nothing" if state is None else policy_pb2.EnginePhase.Name(state.phase).lower()
        raise weights_rejected(engine_id, f"it has not staged them (it said {phase})")
    if state.weights_digest and digest and state.weights_digest != digest:
        raise weights_rejected(engine_id, f"it staged {state.weights_digest}, not {digest}")


def abort(tx: Tx, row: PolicyRow, reason: str) -> None:
    """Give a version up; an aborted one stays as it is.

    Raises:
        StoreError: ILLEGAL_TRANSITION when it is committed.
    """
    if row.status == ABORTED:
        return
    if row.status == COMMITTED:
        name = f"{row.model}/{row.policy_version}"
        raise illegal_transition("policy version", name, "committed", "aborted")
    tx.execute(
        "UPDATE policy_versions SET status = ?, abort_reason = ?, end_time = ? WHERE policy_key = ?",
        (ABORTED, reason[:4096], tx.now, row.key),
    )
    tx.event(row.run_key, POLICY_VERSION, event_pb2.EVENT_KIND_TERMINAL, row.key)


def sweep(tx: Tx) -> None:
    """Abort versions whose deadline has passed."""
    rows = tx.execute(
        f"{_SELECT}WHERE status = {PREPARING} AND deadline <= ? LIMIT {FIRE_LIMIT}", (tx.now,)
    ).fetchall()
    for row in rows:
        abort(tx, PolicyRow._make(row), "its deadline passed before it was committed")
    tx.arm(next_deadline(tx.connection))


def next_deadline(db: Connection) -> int | None:
    """When the next version is due to be aborted; None = none is being prepared."""
    (due,) = db.execute(f"SELECT min(deadline) FROM policy_versions WHERE status = {PREPARING}").fetchone()
    return None if due is None else int(due)


def put_state(tx: Tx, row: PolicyRow, state: policy_pb2.EngineState) -> None:
    """Store what an engine says of a version."""
    stored = policy_pb2.EngineState()
    stored.CopyFrom(state)
    set_time(stored.time, tx.now)
    tx.execute(
        "INSERT INTO engine_states VALUES (?, ?, ?) "
        "ON CONFLICT (policy_key, engine_id) DO UPDATE SET state = excluded.state",
        (row.key, state.engine_id, stored.SerializeToString()),
    )
    tx.event(row.run_key, POLICY_VERSION, event_pb2.EVENT_KIND_UPDATED, row.key)


def load_states(db: Connection, policy_key: int) -> list[policy_pb2.EngineState]:
    """What engines said of a version, by engine id."""
    rows = db.execute(
        "SELECT state FROM engine_states WHERE policy_key = ? ORDER BY engine_id", (policy_key,)
    )
    return [policy_pb2.EngineState.FromString(data) for (data,) in rows]


def load_policy(db: Connection, key: int) -> policy_pb2.PolicyVersion:
    """A policy version that exists, as a message."""
    row = db.execute(
        "SELECT r.run_id, p.model, p.policy_version, p.status, p.weights_digest, p.abort_reason, p.deadline, "
        "p.create_time, p.end_time, p.source FROM policy_versions p JOIN runs r ON r.run_key = p.run_key "
        "WHERE p.policy_key = ?",
        (key,),
    ).fetchone()
    found = policy_pb2.PolicyVersion(
        run_id=row[0],
        model=row[1],
        policy_version=row[2],
        status=row[3],
        weights_digest=row[4],
        abort_reason=row[5],
        engine_states=load_states(db, key),
    )
    set_time(found.deadline, row[6])
    set_time(found.create_time, row[7])
    set_time(found.end_time, row[8])
    found.source.MergeFromString(row[9])
    return found


def put_engine(tx: Tx, run_key: int, engine: policy_pb2.Engine) -> int:
    """Make an engine known or renew what is known of it; returns its key.

    Raises:
        StoreError: INVALID_FIELD.
    """
    if not engine.engine_id:
        raise invalid_field("engine.engine_id", "must not be empty")
    ((key,),) = tx.execute(
        "INSERT INTO engines (engine_id, run_key, model, endpoint, engine_version, active_policy_version, "
        "last_seen_time) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (engine_id) DO UPDATE SET "
        "run_key = excluded.run_key, model = excluded.model, endpoint = excluded.endpoint, "
        "engine_version = excluded.engine_version, active_policy_version = excluded.active_policy_version, "
        "last_seen_time = excluded.last_seen_time RETURNING engine_key",
        (
            *(engine.engine_id, run_key, engine.model, engine.endpoint, engine.engine_version),
            *(engine.active_policy_version, tx.now),
        ),
    ).fetchall()
    tx.event(run_key, event_pb2.ENTITY_KIND_ENGINE, event_pb2.EVENT_KIND_UPDATED, key)
    return int(key)


def load_engine(db: Connection, key: int) -> policy_pb2.Engine:
    """An engine that exists, as a message; `connected` is for the caller to fill in."""
    row = db.execute(
        "SELECT e.engine_id, r.run_id, e.model, e.endpoint, e.engine_version, e.active_policy_version, "
        "e.last_seen_time FROM engines e JOIN runs r ON r.run_key = e.run_key WHERE e.engine_key = ?",
        (key,),
    ).fetchone()
    engine = policy_pb2.Engine(
        engine_id=row[0],
        run_id=row[1],
        model=row[2],
        endpoint=row[3],
        engine_version=row[4],
        active_policy_version=row[5],
    )
    set_time(engine.last_seen_time, row[6])
    return engine
