"""Applies the rules of `lifecycle`: attempts begin and end, rollouts move. Writer's thread only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.errors import illegal_transition
from agl_grpc.store.ids import mint
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.attempts import (
    ATTEMPT,
    CREATED,
    ROLLOUT,
    SEALED,
    TERMINAL,
    UPDATED,
    complete_failure,
    decide_seal,
    revivable,
    settle,
)
from agl_grpc.store.rollouts.bindings import ResourceCache
from agl_grpc.store.rollouts.commands import CANCEL, Commands
from agl_grpc.store.rollouts.dispatch import Dispatcher, Waiter
from agl_grpc.store.rollouts.encode import set_duration, set_time
from agl_grpc.store.rollouts.grading import hold, seal_rollout
from agl_grpc.store.rollouts.lifecycle import AttemptEvent, Outcome, RolloutEvent
from agl_grpc.store.rollouts.names import attempt_status, rollout_status
from agl_grpc.store.rollouts.rows import (
    AttemptRow,
    RolloutRow,
    attempt_by_key,
    attempts_where,
    next_attempt_due,
    rollout_by_key,
)
from agl_grpc.store.storage.bulk import insert_rows, update_rows
from agl_grpc.store.storage.catalog import Catalog
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, rollout_pb2, runner_service_pb2

_INSERT_ATTEMPT = (
    "INSERT INTO attempts (attempt_key, attempt_id, rollout_key, run_key, sequence_id, status, "
    "start_time, worker_key, "
    "session_id, timeout, unresponsive, leased, lease_token, lease_duration, lease_expire_time, due, "
    "resource_key)"
)
_DELIVERED = (
    "UPDATE rollouts SET status = v.column1, ready = 0, due = NULL, attempt_count = v.column2, "
    # The cast is for PostgreSQL: a column of nothing but NULL has no type of its own.
    "latest_attempt_key = v.column3, resource_key = CAST(v.column4 AS BIGINT) "
    "FROM (VALUES {rows}) AS v WHERE rollout_key = v.column5"
)
_DELIVERED_ONE = (
    "UPDATE rollouts SET status = ?, ready = 0, due = NULL, attempt_count = ?, latest_attempt_key = ?, "
    "resource_key = ? WHERE rollout_key = ?"
)
_WORKER_BUSY = (
    "UPDATE workers SET last_dequeue_time = v.column1, last_busy_time = v.column1, "
    "last_heartbeat_time = v.column1, current_attempt_key = v.column2 "
    "FROM (VALUES {rows}) AS v WHERE worker_key = v.column3"
)
_WORKER_IDLE = (
    "UPDATE workers SET last_idle_time = v.column1, current_attempt_key = NULL "
    "FROM (VALUES {rows}) AS v WHERE worker_key = v.column2 AND current_attempt_key = v.column3"
)
_END_ATTEMPT = (
    "UPDATE attempts SET status = ?, end_time = ?, lease_token = NULL, lease_expire_time = NULL, "
    "lease_lost = ?, "
    "sealed = ?, seal_time = ?, seal_due = ?, capture_incomplete = ?, due = ?, failure_kind = ?, failure = ? "
    "WHERE attempt_key = ?"
)
_MOVE_ROLLOUT = (
    "UPDATE rollouts SET status = ?, ready = ?, ready_time = ?, due = ?, end_time = ?, sealed = ?, "
    "ended_attempts = ?, redeliveries = ?, failure_kind = ?, failure = ? WHERE rollout_key = ?"
)


@dataclass(frozen=True, slots=True)
class Begun:
    """A new attempt."""

    key: int
    attempt_id: str
    sequence_id: int
    lease_token: bytes | None
    resource_key: int | None


@dataclass(slots=True)
class Beginnings:
    """Rows of attempts that begin together, so that they are written with few statements."""

    attempts: list[tuple[object, ...]] = field(default_factory=list)
    rollouts: list[tuple[object, ...]] = field(default_factory=list)


def write_begun(tx: Tx, beginnings: Beginnings) -> None:
    """Writes new attempts and what they change in their rollouts."""
    insert_rows(tx.execute, _INSERT_ATTEMPT, beginnings.attempts)
    if len(beginnings.rollouts) == 1:
        tx.execute(_DELIVERED_ONE, beginnings.rollouts[0])
    else:
        update_rows(tx.execute, _DELIVERED, beginnings.rollouts)


class Moves:
    """Begins and ends attempts, and moves rollouts with them."""

    def __init__(
        self, catalog: Catalog, dispatcher: Dispatcher, commands: Commands, signer: CredentialSigner
    ) -> None:
        self.catalog = catalog
        self.dispatcher = dispatcher
        self.commands = commands
        self.signer = signer
        self.resources = ResourceCache()

    # Beginning

    def begin(
        self,
        tx: Tx,
        rollout: RolloutRow,
        worker_key: int | None,
        *,
        session_id: str | None = None,
        lease_duration: int | None = None,
        later: Beginnings | None = None,
    ) -> Begun:
        """A new attempt at a rollout.

        Args:
            tx: The transaction.
            rollout: Not terminal.
            worker_key: Who does it; None = unknown.
            session_id: The worker's session, when leased.
            lease_duration: Microseconds; None = no lease.
            later: Where the rows are gathered that `write_begun` writes; None = they are written at once.

        Raises:
            StoreError: ILLEGAL_TRANSITION when the rollout is terminal.
        """
        move = lifecycle.move_rollout(rollout.status, RolloutEvent.DELIVER)
        if move.outcome is Outcome.REFUSED:
            now, wanted = rollout_status(rollout.status), rollout_status(lifecycle.PREPARING)
            raise illegal_transition("rollout", rollout.rollout_id, now, wanted)
        if rollout.latest_attempt_key is not None:
            self._supersede(tx, attempt_by_key(tx.connection, rollout.latest_attempt_key))
        resource_key = rollout.resource_key
        if resource_key is None:
            resource_key = self.resources.latest(tx, rollout.run_key)
        expire = None if lease_duration is None else tx.now + lease_duration
        clocks = lifecycle.Clocks(tx.now, None, rollout.timeout, rollout.unresponsive, expire, None)
        due = lifecycle.next_due(True, clocks)
        begun_id, token = mint("at"), None if lease_duration is None else os.urandom(16)
        sequence_id = rollout.attempt_count + 1
        key = tx.counters.take("attempts")
        beginnings = Beginnings() if later is None else later
        beginnings.attempts.append(
            (
                *(key, begun_id, rollout.key, rollout.run_key, sequence_id, lifecycle.A_PREPARING, tx.now),
                *(worker_key, session_id, rollout.timeout, rollout.unresponsive, int(token is not None)),
                *(token, lease_duration, expire, due, resource_key),
            ),
        )
        beginnings.rollouts.append((move.status, sequence_id, key, resource_key, rollout.key))
        if later is None:
            write_begun(tx, beginnings)
        tx.arm(due)
        if worker_key is not None:
            tx.defer("busy", worker_key, _WORKER_BUSY, (tx.now, key, worker_key))
        tx.event(rollout.run_key, ROLLOUT, UPDATED, rollout.key)
        tx.event(rollout.run_key, ATTEMPT, CREATED, key)
        return Begun(key, begun_id, sequence_id, token, resource_key)

    def _supersede(self, tx: Tx, older: AttemptRow) -> None:
        # A silent attempt could come back until now; from here on it is over.
        if older.status == lifecycle.A_UNRESPONSIVE and not older.sealed and older.seal_due is None:
            settle(tx, older)

    def lease(
        self,
        tx: Tx,
        waiter: Waiter,
        rollout: RolloutRow,
        message: rollout_pb2.Rollout | None = None,
        body: bytes | None = None,
        later: Beginnings | None = None,
    ) -> runner_service_pb2.LeasedRollout:
        """Leases a rollout to a waiter that gave a credit for it; delivered after the commit.

        Args:
            tx: The transaction.
            waiter: Who gets it.
            rollout: Queued.
            message: The rollout as a message, when the caller has it already and has weighed it; a copy is
                changed.
            body: Its unchanging part, when the caller has that.
            later: As for `begin`.
        """
        begun = self.begin(
            tx,
            rollout,
            waiter.worker_key,
            session_id=waiter.session_id,
            lease_duration=waiter.duration,
            later=later,
        )
        leased = runner_service_pb2.LeasedRollout()
        if message is not None:
            leased.rollout.CopyFrom(message)
        else:
            if body is None:
                sql = "SELECT body FROM rollout_bodies WHERE rollout_key = ?"
                (body,) = tx.execute(sql, (rollout.key,)).fetchone()
            leased.rollout.MergeFromString(body)
            self.weigh(tx, waiter, len(body), begun.resource_key)
        self._describe(tx, leased, rollout, begun, waiter)
        if waiter.batch is None:
            tx.after_commit(lambda: waiter.deliver(leased))
        else:
            waiter.batch.append(leased)
            tx.after_rollback(waiter.batch.clear)
        return leased

    def weigh(self, tx: Tx, waiter: Waiter, size: int, resource_key: int | None) -> None:
        """Counts the bytes of a delivery: of the rollout, and of the resources that go with it."""
        if resource_key is not None:
            size += self.resources.size(tx, resource_key)
        waiter.add(tx, size)

    def serve(self, tx: Tx, waiter: Waiter) -> int:
        """Leases to a waiter what is ready for it; returns how much."""
        later, count = Beginnings(), 0
        for ready in self.dispatcher.serve(tx, waiter):
            self.lease(tx, waiter, ready.row, body=ready.body, later=later)
            count += 1
        write_begun(tx, later)
        return count

    def _describe(
        self,
        tx: Tx,
        leased: runner_service_pb2.LeasedRollout,
        rollout: RolloutRow,
        begun: Begun,
        waiter: Waiter,
    ) -> None:
        attempt = leased.attempt
        attempt.rollout_id = rollout.rollout_id
        attempt.attempt_id = begun.attempt_id
        attempt.sequence_id = begun.sequence_id
        attempt.status = attempt_pb2.ATTEMPT_STATUS_PREPARING
        attempt.worker_id = waiter.worker_id
        attempt.leased = True
        set_time(attempt.start_time, tx.now)
        leased.rollout.status = rollout_pb2.ROLLOUT_STATUS_PREPARING
        leased.rollout.attempt_count = begun.sequence_id
        leased.rollout.latest_attempt_id = begun.attempt_id
        lease = leased.lease
        lease.rollout_id = rollout.rollout_id
        lease.attempt_id = begun.attempt_id
        lease.lease_token = begun.lease_token or b""
        lease.attempt_credential = self.credential(tx, rollout, begun.attempt_id)
        set_duration(lease.duration, waiter.duration)
        if begun.resource_key is not None:
            leased.resources.CopyFrom(self.resources.get(tx, begun.resource_key))
            self.name_resources(tx, leased.rollout, begun.resource_key)
            self.name_resources(tx, attempt, begun.resource_key)

    def name_resources(
        self, tx: Tx, holder: attempt_pb2.Attempt | rollout_pb2.Rollout, resource_key: int
    ) -> None:
        """Fills in which publication of resources a rollout or an attempt is bound to."""
        resources = self.resources.get(tx, resource_key)
        holder.resources_id = resources.resources_id
        holder.resources_version = resources.version

    def credential(self, tx: Tx, rollout: RolloutRow, attempt_id: str) -> str:
        """The agent's credential for an attempt."""
        run_id = self.catalog.run_by_key(tx, rollout.run_key).run_id
        return self.signer.mint(run_id, rollout.rollout_id, attempt_id)

    def make_ready(self, tx: Tx, rollout: RolloutRow) -> None:
        """Leases a queued rollout to whoever waits for it, else leaves it marked as ready."""
        queue = self.catalog.queue_by_key(tx, rollout.queue_key)
        waiter = self.dispatcher.pick(tx, queue, rollout.label_set_key)
        if waiter is not None:
            self.lease(tx, waiter, rollout)
            return
        tx.arm(rollout.expire_time)
        tx.execute(
            "UPDATE rollouts SET ready = 1, due = ? WHERE rollout_key = ?", (rollout.expire_time, rollout.key)
        )

    # Ending

    def end(
        self,
        tx: Tx,
        attempt: AttemptRow,
        event: AttemptEvent,
        failure: attempt_pb2.Failure | None = None,
        *,
        order: str = "",
        rollout: RolloutRow | None = None,
    ) -> bool:
        """Ends an attempt and, if it is the newest, moves its rollout (R5).

        Args:
            tx: The transaction.
            attempt: The attempt.
            event: How it ends; not SIGNAL.
            failure: Why; a kind is filled in when it names none.
            order: When not empty, its worker is ordered to stop for this reason.
            rollout: Its rollout, when the caller has just read it.

        Returns:
            Whether anything changed.

        Raises:
            StoreError: ILLEGAL_TRANSITION.
        """
        rollout = rollout or rollout_by_key(tx.connection, attempt.rollout_key)
        move = lifecycle.move_attempt(attempt.status, event, revivable=revivable(attempt, rollout))
        if move.outcome is Outcome.REFUSED:
            wanted = attempt_status(lifecycle.move_attempt(lifecycle.A_RUNNING, event).status)
            raise illegal_transition("attempt", attempt.attempt_id, attempt_status(attempt.status), wanted)
        if move.outcome is Outcome.KEPT:
            return False
        blame = complete_failure(event, failure)
        newest = rollout.latest_attempt_key == attempt.key
        verdict = None
        if newest:
            # A silent attempt that comes back was counted when it fell silent.
            back = attempt.status == lifecycle.A_UNRESPONSIVE
            rules = replace(rollout.rules, ended_attempts=rollout.ended_attempts - back)
            verdict = lifecycle.judge(rules, event, 0 if blame is None else blame.kind)
        rollout_status_after = rollout.status
        if verdict is not None:
            rollout_status_after = lifecycle.move_rollout(rollout.status, verdict.event).status
        over = not lifecycle.is_revivable(
            move.status, leased=bool(attempt.leased), newest=newest, rollout_status=rollout_status_after
        )
        sealed = self._write_end(tx, attempt, move.status, event, blame, over)
        if order and attempt.leased and attempt.worker_key is not None:
            self.commands.add(tx, attempt.worker_key, CANCEL, attempt_key=attempt.key, reason=order)
        if verdict is not None:
            self.move(tx, rollout, verdict, sealed, blame)
        return True

    def _write_end(
        self,
        tx: Tx,
        attempt: AttemptRow,
        status: int,
        event: AttemptEvent,
        blame: attempt_pb2.Failure | None,
        over: bool,
    ) -> bool:
        seal = decide_seal(tx, attempt, over=over)
        lost = int(event is AttemptEvent.LOSE_LEASE)
        tx.execute(
            _END_ATTEMPT,
            (
                *(status, tx.now, lost, int(seal.now), tx.now if seal.now else None, seal.due),
                *(int(seal.incomplete), seal.look, 0 if blame is None else blame.kind),
                *(None if blame is None else blame.SerializeToString(), attempt.key),
            ),
        )
        tx.arm(seal.look)
        if attempt.worker_key is not None:
            tx.defer("idle", attempt.worker_key, _WORKER_IDLE, (tx.now, attempt.worker_key, attempt.key))
        tx.event(attempt.run_key, ATTEMPT, TERMINAL, attempt.key)
        if seal.now:
            tx.event(attempt.run_key, ATTEMPT, SEALED, attempt.key)
        return seal.now

    def move(
        self,
        tx: Tx,
        rollout: RolloutRow,
        verdict: lifecycle.Verdict,
        sealed: bool,
        blame: attempt_pb2.Failure | None,
    ) -> None:
        """Moves a rollout after its newest attempt; `sealed` says whether that attempt is."""
        move = lifecycle.move_rollout(rollout.status, verdict.event)
        if rollout.status in lifecycle.ROLLOUT_TERMINAL:
            if sealed and not rollout.sealed:
                seal_rollout(tx, rollout)
            return
        terminal = move.status in lifecycle.ROLLOUT_TERMINAL
        if terminal and sealed:
            # A run without graders is known to have none: no row is read for it.
            awaited = self.catalog.run_by_key(tx, rollout.run_key).graded
            sealed = not (awaited and hold(tx, rollout, move.status))
        waiting = move.status in lifecycle.ROLLOUT_WAITING
        ready_time = tx.now + verdict.delay
        due = None
        if waiting:
            due = min(x for x in (ready_time, rollout.expire_time) if x is not None)
        failed = move.status == lifecycle.FAILED and blame is not None
        tx.execute(
            _MOVE_ROLLOUT,
            (
                *(move.status, 0, ready_time if waiting else rollout.ready_time, due),
                *(tx.now if terminal else None, int(terminal and sealed)),
                *(verdict.ended_attempts, verdict.redeliveries),
                *(
                    blame.kind if failed and blame else 0,
                    blame.SerializeToString() if failed and blame else None,
                ),
                rollout.key,
            ),
        )
        self.announce(tx, rollout, terminal, terminal and sealed)
        if waiting and verdict.delay == 0:
            self.make_ready(tx, rollout_by_key(tx.connection, rollout.key))
        else:
            tx.arm(due)

    def announce(self, tx: Tx, rollout: RolloutRow, terminal: bool, sealed: bool) -> None:
        """Logs that a rollout has moved."""
        tx.event(rollout.run_key, ROLLOUT, TERMINAL if terminal else UPDATED, rollout.key)
        if sealed:
            tx.event(rollout.run_key, ROLLOUT, SEALED, rollout.key)

    def end_alone(
        self, tx: Tx, attempt: AttemptRow, event: AttemptEvent, failure: attempt_pb2.Failure, *, order: str
    ) -> None:
        """Ends a live attempt without moving its rollout, which has been moved by hand."""
        status = lifecycle.move_attempt(attempt.status, event).status
        self._write_end(tx, attempt, status, event, complete_failure(event, failure), over=True)
        if attempt.leased and attempt.worker_key is not None:
            self.commands.add(tx, attempt.worker_key, CANCEL, attempt_key=attempt.key, reason=order)

    # Timers

    def sweep(self, tx: Tx, limit: int) -> None:
        """Does what is due to attempts by itself (R7, R9, R11)."""
        rows = attempts_where(tx.connection, "WHERE due <= ? ORDER BY due LIMIT ?", tx.now, limit)
        for attempt in rows:
            live = attempt.status in lifecycle.ATTEMPT_LIVE
            event = lifecycle.fire(live, attempt.clocks, tx.now)
            if event is not None:
                failure = attempt_pb2.Failure(message=_EXPIRY_MESSAGES[event])
                self.end(tx, attempt, event, failure, order=_ORDERS.get(event, ""))
            elif not live and attempt.seal_due is not None:
                settle(tx, attempt)
            else:
                due = lifecycle.next_due(live, attempt.clocks)
                tx.execute("UPDATE attempts SET due = ? WHERE attempt_key = ?", (due, attempt.key))
        tx.arm(next_attempt_due(tx.connection))


_EXPIRY_MESSAGES = {
    AttemptEvent.TIME_OUT: "the attempt took longer than its timeout",
    AttemptEvent.FALL_SILENT: "no span and no heartbeat came for longer than allowed",
    AttemptEvent.LOSE_LEASE: "the lease was not renewed in time",
}
_ORDERS = {
    AttemptEvent.TIME_OUT: "the attempt took longer than its timeout",
    AttemptEvent.FALL_SILENT: "no span and no heartbeat came for longer than allowed",
}
