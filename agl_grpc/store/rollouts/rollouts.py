"""Rollouts: made, changed, cancelled, tried again, deleted. Writer's thread only."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import duration_pb2

from agl_grpc.store import blobs
from agl_grpc.store.errors import exists, illegal_transition, invalid_field
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.attempts import CREATED, ROLLOUT, UPDATED, settle
from agl_grpc.store.rollouts.bindings import named_key
from agl_grpc.store.rollouts.dispatch import Waiter
from agl_grpc.store.rollouts.encode import load_rollout, load_rollouts
from agl_grpc.store.rollouts.grading import seal_rollout
from agl_grpc.store.rollouts.lifecycle import AttemptEvent, Outcome, RolloutEvent
from agl_grpc.store.rollouts.moves import Beginnings, Moves, write_begun
from agl_grpc.store.rollouts.names import rollout_status
from agl_grpc.store.rollouts.rows import (
    AttemptRow,
    RolloutRow,
    attempt_by_key,
    attempts_where,
    next_rollout_due,
    rollout_by_id,
    rollout_by_key,
    rollouts_where,
)
from agl_grpc.store.rollouts.specs import Plan, plan_of
from agl_grpc.store.storage.bulk import insert_rows
from agl_grpc.store.storage.catalog import RunRow, labels_of
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, rollout_pb2

_INSERT = (
    "INSERT INTO rollouts (rollout_key, rollout_id, run_key, queue_key, group_key, label_set_key, "
    "priority, mode, "
    "status, ready, ready_time, due, create_time, expire_time, timeout, unresponsive, max_attempts, "
    "retry_mask, "
    "max_redeliveries, backoff, binding, resource_key)"
)
_INSERT_BODY = "INSERT INTO rollout_bodies (rollout_key, body)"


class Rollouts:
    """Changes to rollouts."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._catalog = moves.catalog

    def enqueue(
        self, tx: Tx, run: RunRow, specs: Sequence[rollout_pb2.RolloutSpec], *, retry_of: Sequence[str] = ()
    ) -> list[rollout_pb2.Rollout]:
        """Puts rollouts into their queues; those that somebody waits for are leased at once (R12).

        Raises:
            StoreError: INVALID_FIELD, ENTITY_EXISTS, RESOURCE_MISSING; then none is made.
        """
        first = tx.counters.take("rollouts", len(specs))
        latest = self._moves.resources.latest(tx, run.run_key)
        plans = [
            self._plan(tx, run, spec, f"rollouts[{i}]", first + i, latest, retry_of[i] if retry_of else "")
            for i, spec in enumerate(specs)
        ]
        matches = [self._match(tx, plan) for plan in plans]
        self._insert(tx, run, plans, matches)
        later = Beginnings()
        for plan, waiter in zip(plans, matches, strict=True):
            if waiter is not None:
                self._moves.lease(tx, waiter, plan.row(run.run_key), plan.message, later=later)
        write_begun(tx, later)
        return [plan.message for plan in plans]

    def start(self, tx: Tx, run: RunRow, spec: rollout_pb2.RolloutSpec) -> RolloutRow:
        """Makes a rollout that never enters its queue; the caller begins its first attempt."""
        first = tx.counters.take("rollouts")
        plan = self._plan(tx, run, spec, "rollout", first, self._moves.resources.latest(tx, run.run_key), "")
        plan.queued = False
        self._insert(tx, run, [plan], [None])
        return rollout_by_key(tx.connection, first)

    def _plan(
        self,
        tx: Tx,
        run: RunRow,
        spec: rollout_pb2.RolloutSpec,
        path: str,
        key: int,
        latest: int | None,
        retry_of: str,
    ) -> Plan:
        plan = plan_of(spec, path, key, run.run_id, tx.now)
        plan.message.retry_of = retry_of
        blobs.refer(tx, key, plan.message.input, f"{path}.input")
        if (
            spec.rollout_id
            and tx.execute("SELECT 1 FROM rollouts WHERE rollout_id = ?", (spec.rollout_id,)).fetchone()
        ):
            raise exists("rollout", spec.rollout_id)
        plan.queue_key = self._catalog.queue(tx, run, spec.queue).queue_key
        plan.message.queue = spec.queue or run.run_id
        plan.group_key = self._catalog.group(tx, run.run_key, spec.group_id)
        if spec.labels:
            plan.label_set_key = self._catalog.label_set(tx, labels_of(spec.labels, f"{path}.labels"))
        if spec.resources_id:
            plan.resource_key = named_key(
                tx.connection, run.run_key, spec.resources_id, spec.resources_version
            )
        elif spec.resources_version:
            raise invalid_field(f"{path}.resources_version", "needs resources_id")
        elif plan.message.binding != rollout_pb2.RESOURCE_BINDING_AT_LEASE:
            plan.resource_key = latest
        return plan

    def _match(self, tx: Tx, plan: Plan) -> Waiter | None:
        if plan.ready_time > tx.now:
            return None
        queue = self._catalog.queue_by_key(tx, plan.queue_key)
        waiter = self._moves.dispatcher.pick(tx, queue, plan.label_set_key)
        if waiter is not None:
            self._moves.weigh(tx, waiter, plan.message.ByteSize(), plan.resource_key)
        return waiter

    def _insert(self, tx: Tx, run: RunRow, plans: Sequence[Plan], matches: Sequence[Waiter | None]) -> None:
        seen: set[str] = set()
        rows = []
        for plan, waiter in zip(plans, matches, strict=True):
            if plan.message.rollout_id in seen:
                raise exists("rollout", plan.message.rollout_id)
            seen.add(plan.message.rollout_id)
            waits = plan.queued and waiter is None
            rows.append(plan.columns(run.run_key, tx.now, waits))
            if waits:
                tx.arm(plan.due(tx.now))
            tx.event(run.run_key, ROLLOUT, CREATED, plan.key)
        insert_rows(tx.execute, _INSERT, rows)
        bodies = [(plan.key, plan.message.SerializeToString()) for plan in plans]
        insert_rows(tx.execute, _INSERT_BODY, bodies)
        for plan in plans:
            plan.message.status = rollout_pb2.ROLLOUT_STATUS_QUEUING
            if plan.resource_key is not None:
                self._moves.name_resources(tx, plan.message, plan.resource_key)

    # Changes

    def update(self, tx: Tx, wanted: rollout_pb2.Rollout, paths: Sequence[str]) -> rollout_pb2.Rollout:
        """Changes fields of a rollout.

        Args:
            tx: The transaction.
            wanted: The new values; its id names the rollout.
            paths: Which of input, mode, resources_id, status, config, metadata, labels, priority.

        Raises:
            StoreError: NOT_FOUND, INVALID_FIELD, ILLEGAL_TRANSITION, RESOURCE_MISSING.
        """
        row = rollout_by_id(tx.connection, wanted.rollout_id)
        (body,) = tx.execute("SELECT body FROM rollout_bodies WHERE rollout_key = ?", (row.key,)).fetchone()
        message = rollout_pb2.Rollout.FromString(body)
        for path in paths:
            if path not in _UPDATABLE:
                raise invalid_field("update_mask", f"may name {', '.join(_UPDATABLE)}; not {path!r}")
            if path in ("input", "config"):
                getattr(message, path).CopyFrom(getattr(wanted, path))
                blobs.refer(tx, row.key, message.input, "rollout.input")
            elif path in ("metadata", "labels"):
                del getattr(message, path)[:]
                getattr(message, path).extend(getattr(wanted, path))
            elif path in ("mode", "priority"):
                setattr(message, path, getattr(wanted, path))
        self._write_update(tx, row, message, wanted, paths)
        tx.event(row.run_key, ROLLOUT, UPDATED, row.key)
        if "status" in paths:
            self._assign(tx, rollout_by_key(tx.connection, row.key), int(wanted.status))
        else:
            changed = rollout_by_key(tx.connection, row.key)
            if changed.ready:
                self._moves.make_ready(tx, changed)
        return load_rollout(tx.connection, row.key)

    def _write_update(
        self,
        tx: Tx,
        row: RolloutRow,
        message: rollout_pb2.Rollout,
        wanted: rollout_pb2.Rollout,
        paths: Sequence[str],
    ) -> None:
        spec = rollout_pb2.RolloutSpec(
            input=message.input, mode=message.mode, config=message.config, priority=message.priority
        )
        spec.metadata.extend(message.metadata)
        plan = plan_of(spec, "rollout", row.key, message.run_id, tx.now)
        message.config.CopyFrom(plan.message.config)
        label_set_key = row.label_set_key
        if "labels" in paths:
            label_set_key = self._catalog.label_set(tx, labels_of(message.labels, "rollout.labels"))
        resource_key = row.resource_key
        if "resources_id" in paths:
            resource_key = None
            if wanted.resources_id:
                version = wanted.resources_version
                resource_key = named_key(tx.connection, row.run_key, wanted.resources_id, version)
        rules = plan.rules
        tx.execute(
            "UPDATE rollouts SET mode = ?, priority = ?, label_set_key = ?, resource_key = ?, timeout = ?, "
            "unresponsive = ?, max_attempts = ?, retry_mask = ?, max_redeliveries = ?, backoff = ? "
            "WHERE rollout_key = ?",
            (
                *(message.mode, message.priority, label_set_key, resource_key, plan.timeout),
                *(plan.unresponsive, rules.max_attempts, rules.retry_mask, rules.max_redeliveries),
                *(rules.backoff, row.key),
            ),
        )
        tx.execute(
            "UPDATE rollout_bodies SET body = ? WHERE rollout_key = ?", (message.SerializeToString(), row.key)
        )

    def _assign(self, tx: Tx, row: RolloutRow, wanted: int) -> None:
        if wanted not in lifecycle.ROLLOUT_STATES:
            raise invalid_field("rollout.status", "must be a state")
        move = lifecycle.assign_rollout(row.status, wanted)
        if move.outcome is Outcome.REFUSED:
            raise illegal_transition(
                "rollout", row.rollout_id, rollout_status(row.status), rollout_status(wanted)
            )
        if move.outcome is Outcome.KEPT:
            return
        if wanted == lifecycle.CANCELLED:
            self.cancel(tx, row, "cancelled by its owner")
            return
        terminal, waiting = wanted in lifecycle.ROLLOUT_TERMINAL, wanted in lifecycle.ROLLOUT_WAITING
        newest = self._newest(tx, row)
        tx.execute(
            "UPDATE rollouts SET status = ?, ready = 0, due = NULL, end_time = ?, "
            "sealed = ? WHERE rollout_key = ?",
            (wanted, tx.now if terminal else None, int(terminal and newest is None), row.key),
        )
        self._moves.announce(tx, row, terminal, terminal and newest is None)
        if newest is not None and (terminal or waiting):
            self._let_go(tx, newest, rollout_by_key(tx.connection, row.key))
        if waiting:
            self._moves.make_ready(tx, rollout_by_key(tx.connection, row.key))

    def _let_go(self, tx: Tx, newest: AttemptRow, row: RolloutRow) -> None:
        """A rollout was finished or requeued by hand: a worker stops, "
        "an attempt without a lease may go on."""
        if newest.leased and newest.status in lifecycle.ATTEMPT_LIVE:
            failure = attempt_pb2.Failure(message=f"its rollout was set to {rollout_status(row.status)}")
            self._moves.end_alone(tx, newest, AttemptEvent.CANCEL, failure, order=failure.message)
            newest = attempt_by_key(tx.connection, newest.key)
        over = newest.status not in lifecycle.ATTEMPT_LIVE
        if over and row.status in lifecycle.ROLLOUT_TERMINAL:
            if newest.sealed:
                seal_rollout(tx, row)
            elif newest.seal_due is None:
                settle(tx, newest)

    def cancel(self, tx: Tx, row: RolloutRow, reason: str) -> bool:
        """Cancels a rollout and whatever works on it; returns whether it was not finished already."""
        move = lifecycle.move_rollout(row.status, RolloutEvent.CANCEL)
        if move.outcome is Outcome.KEPT:
            return False
        failure = attempt_pb2.Failure(kind=attempt_pb2.FAILURE_KIND_CANCELLED, message=reason)
        newest = self._newest(tx, row)
        older = attempts_where(
            tx.connection,
            "WHERE rollout_key = ? AND status IN (?, ?) AND attempt_key != ?",
            *(row.key, lifecycle.A_PREPARING, lifecycle.A_RUNNING, newest.key if newest else 0),
        )
        for attempt in older:
            self._moves.end(tx, attempt, AttemptEvent.CANCEL, failure, order=reason)
        if newest is not None and self._moves.end(tx, newest, AttemptEvent.CANCEL, failure, order=reason):
            return True
        sealed = newest is None or bool(newest.sealed)
        verdict = lifecycle.Verdict(RolloutEvent.CANCEL, row.ended_attempts, row.redeliveries)
        self._moves.move(tx, row, verdict, sealed, None)
        return True

    def _newest(self, tx: Tx, row: RolloutRow) -> AttemptRow | None:
        if row.latest_attempt_key is None:
            return None
        return attempt_by_key(tx.connection, row.latest_attempt_key)

    def retry(
        self, tx: Tx, rows: Sequence[RolloutRow], expire_after: duration_pb2.Duration | None
    ) -> list[rollout_pb2.Rollout]:
        """New rollouts that try finished ones again (R4), in the order given.

        Args:
            tx: The transaction.
            rows: The finished ones, of any runs.
            expire_after: How long the new ones may wait in their queues; None = as the old ones.
        """
        old = load_rollouts(tx.connection, [row.key for row in rows])
        of_run: dict[int, list[RolloutRow]] = {}
        for row in rows:
            of_run.setdefault(row.run_key, []).append(row)
        made: dict[int, rollout_pb2.Rollout] = {}
        for run_key, again in of_run.items():
            specs = [_again(old[row.key], row, expire_after) for row in again]
            run = self._catalog.run_by_key(tx, run_key)
            found = self.enqueue(tx, run, specs, retry_of=[row.rollout_id for row in again])
            made.update(zip((row.key for row in again), found, strict=True))
        return [made[row.key] for row in rows]

    def require(self, tx: Tx, rollout_id: str) -> RolloutRow:
        """A rollout by its id.

        Raises:
            StoreError: INVALID_FIELD when empty, NOT_FOUND.
        """
        if not rollout_id:
            raise invalid_field("rollout_id", "must not be empty")
        return rollout_by_id(tx.connection, rollout_id)

    # Timers

    def sweep(self, tx: Tx, limit: int) -> None:
        """Delivers what waited for its time, cancels what waited too long (R7)."""
        for row in rollouts_where(tx.connection, "WHERE due <= ? ORDER BY due LIMIT ?", tx.now, limit):
            if row.expire_time is not None and row.expire_time <= tx.now:
                self.cancel(tx, row, "it waited in its queue for longer than expire_after")
            else:
                self._moves.make_ready(tx, row)
        tx.arm(next_rollout_due(tx.connection))


def _again(
    old: rollout_pb2.Rollout, row: RolloutRow, expire_after: duration_pb2.Duration | None
) -> rollout_pb2.RolloutSpec:
    """What is asked for when a rollout is tried again."""
    spec = rollout_pb2.RolloutSpec(
        input=old.input if old.HasField("input") else None,
        mode=old.mode,
        config=old.config,
        group_id=old.group_id,
        queue=old.queue,
        priority=old.priority,
        binding=old.binding,
        labels=old.labels,
        metadata=old.metadata,
    )
    if row.resource_key is not None:
        spec.resources_id, spec.resources_version = old.resources_id, old.resources_version
    if expire_after is not None:
        spec.expire_after.CopyFrom(expire_after)
    elif old.HasField("expire_after"):
        spec.expire_after.CopyFrom(old.expire_after)
    return spec


_UPDATABLE = ("input", "mode", "resources_id", "status", "config", "metadata", "labels", "priority")
