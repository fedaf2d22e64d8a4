"""Who waits for work. Lives in the writer's thread: credits and deliveries share one order of events.

Invariant: after every command, a waiter that still has credits has no deliverable rollout in its queues.
So a new rollout that finds a matching waiter can be leased in the transaction that makes it (R12).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agl_grpc.store.rollouts.rows import Ready, ready_rollouts
from agl_grpc.store.storage.catalog import Catalog, Labels, QueueRow
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import runner_service_pb2


@dataclass(eq=False, slots=True)
class Waiter:
    """A lease stream or a long poll that can take work.

    Attributes:
        run_key: The run it serves.
        queue_keys: The queues it serves.
        labels: It takes rollouts whose labels are all among these; None = any.
        worker_key: The worker.
        worker_id: The worker's id.
        session_id: The worker's session.
        duration: Wanted lease duration in microseconds.
        deliver: Called on the event loop, after the commit, once per leased rollout.
        once: Set for a long poll, which takes from one command only; called at its first delivery.
        batch: Where a long poll's deliveries are gathered; None = `deliver` gets each.
        notice: Called on the event loop with the reason why nothing comes.
        credits: Deliveries that it can still take.
        closed: Gone: takes nothing more.
    """

    run_key: int
    queue_keys: tuple[int, ...]
    labels: Labels | None
    worker_key: int
    worker_id: str
    session_id: str
    duration: int
    deliver: Callable[[runner_service_pb2.LeasedRollout], None]
    once: Callable[[Tx], None] | None = None
    batch: list[runner_service_pb2.LeasedRollout] | None = None
    notice: Callable[[str], None] | None = None
    credits: int = 0
    closed: bool = False
    lines: set[int] = field(default_factory=set)
    taken_by: Tx | None = None

    def can_take(self, tx: Tx) -> bool:
        """Whether a delivery in this command is possible."""
        return not self.closed and self.credits > 0 and (self.taken_by is None or self.taken_by is tx)


class Dispatcher:
    """Lines of waiters, one for each queue."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lines: dict[int, deque[Waiter]] = {}

    def add_credits(self, tx: Tx, waiter: Waiter, count: int) -> None:
        """Lets the waiter take `count` more deliveries; the caller then serves what is ready."""
        waiter.credits += count

        def undo() -> None:
            waiter.credits -= count

        tx.after_rollback(undo)
        self._line_up(waiter)

    def close(self, waiter: Waiter) -> None:
        """The waiter takes nothing more; a close is never undone."""
        waiter.closed = True
        self.leave(waiter)

    def leave(self, waiter: Waiter) -> None:
        """Takes the waiter out of its lines; it lines up again if the command comes to nothing."""
        for queue_key in waiter.lines:
            self._lines[queue_key].remove(waiter)
            if not self._lines[queue_key]:
                del self._lines[queue_key]
        waiter.lines.clear()

    def pick(self, tx: Tx, queue: QueueRow, label_set_key: int) -> Waiter | None:
        """Takes a credit of the waiter that is next in line for such a rollout; None = nobody waits."""
        line = self._lines.get(queue.queue_key)
        if line is None or queue.paused or self._catalog.run_by_key(tx, queue.run_key).paused:
            return None
        for _ in range(len(line)):
            waiter = line[0]
            if not waiter.can_take(tx):
                line.popleft()
                waiter.lines.discard(queue.queue_key)
                continue
            line.rotate(-1)
            if waiter.labels is None or label_set_key in self._catalog.label_sets_within(tx, waiter.labels):
                self._take(tx, waiter)
                return waiter
        if not line:
            del self._lines[queue.queue_key]
        return None

    def serve(self, tx: Tx, waiter: Waiter) -> list[Ready]:
        """Takes credits for ready rollouts, most urgent first; the caller leases them."""
        if not waiter.can_take(tx):
            return []
        ready = self.ready(tx, waiter.queue_keys, waiter.labels, waiter.credits)
        for _ in ready:
            self._take(tx, waiter)
        return ready

    def ready(self, tx: Tx, queue_keys: Iterable[int], labels: Labels | None, limit: int) -> list[Ready]:
        """Rollouts that can be delivered now from these queues, most urgent first."""
        found: list[Ready] = []
        for queue_key in queue_keys:
            queue = self._catalog.queue_by_key(tx, queue_key)
            if queue.paused or self._catalog.run_by_key(tx, queue.run_key).paused:
                continue
            sets = None if labels is None else self._catalog.label_sets_within(tx, labels)
            found += ready_rollouts(tx.connection, queue_key, sets, limit)
        found.sort(key=lambda ready: (-ready.priority, ready.row.key))
        return found[:limit]

    def idle_reason(self, tx: Tx, waiter: Waiter) -> str:
        """Why a waiter with credits gets nothing."""
        queues = [self._catalog.queue_by_key(tx, key) for key in waiter.queue_keys]
        paused = [queue.paused or self._catalog.run_by_key(tx, queue.run_key).paused for queue in queues]
        if all(paused):
            return "paused"
        if waiter.labels is not None and self.ready(tx, waiter.queue_keys, None, 1):
            return "no work with its labels"
        return "no work"

    def has_waiters(self) -> bool:
        """Whether anybody waits; from any thread, as a hint."""
        return bool(self._lines)

    def queue_keys(self) -> list[int]:
        """Queues in which somebody waits; from any thread, as a hint."""
        return list(self._lines)

    def waiting(self, queue_keys: Iterable[int]) -> list[Waiter]:
        """Waiters with credits in these queues, each once."""
        found = {waiter: None for key in queue_keys for waiter in self._lines.get(key, ())}
        return [waiter for waiter in found if not waiter.closed and waiter.credits > 0]

    def _take(self, tx: Tx, waiter: Waiter) -> None:
        waiter.credits -= 1
        first = waiter.once is not None and waiter.taken_by is None
        if first:
            waiter.taken_by = tx
            if waiter.once is not None:
                waiter.once(tx)

        def undo() -> None:
            waiter.credits += 1
            if first:
                waiter.taken_by = None
            self._line_up(waiter)

        tx.after_rollback(undo)

    def _line_up(self, waiter: Waiter) -> None:
        if waiter.closed or waiter.credits <= 0:
            return
        for queue_key in waiter.queue_keys:
            if queue_key not in waiter.lines:
                waiter.lines.add(queue_key)
                self._lines.setdefault(queue_key, deque()).append(waiter)
