"""Who waits for work. Lives in the writer's thread: credits and deliveries share one order of events.

Invariant: after every command, a waiter that still has credits has no deliverable rollout in its queues.
So a new rollout that finds a matching waiter can be leased in the transaction that makes it (R12).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from agl_grpc.store.limits import LARGE_ANSWER_BYTES
from agl_grpc.store.rollouts.rows import Ready, ready_rollouts
from agl_grpc.store.storage.catalog import Catalog, Labels, QueueRow
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import runner_service_pb2

_READ_AT_ONCE = 32
"""Rollouts that are read at once: with the largest inputs they fill 32 MiB."""

_OVERHEAD = 1024
"""Bytes of a delivery beside the rollout and its resources, at most."""


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
        is_current: Whether no newer stream of its session is open at another server; asked before a delivery
            when several servers may have the database, else None.
        closed: Gone: takes nothing more.
        sizes: Bytes of deliveries that are not sent yet, oldest first.
        held_back: It could take nothing because so much is not sent yet; its stream then asks anew.
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
    is_current: Callable[[Tx], bool] | None = None
    credits: int = 0
    closed: bool = False
    lines: set[int] = field(default_factory=set)
    taken_by: Tx | None = None
    sizes: deque[int] = field(default_factory=deque)
    held_back: bool = False
    _leased: int = 0
    _sent: int = 0

    def can_take(self, tx: Tx) -> bool:
        """Whether a delivery in this command is possible."""
        if self.closed or self.credits <= 0 or (self.taken_by is not None and self.taken_by is not tx):
            return False
        if self.is_current is not None and not self.is_current(tx):
            self.closed = True
            return False
        if self._is_full():
            # Said first, then looked at again: `sent` does it the other way round, in another thread.
            self.held_back = True
            if self._is_full():
                return False
        return True

    def _is_full(self) -> bool:
        return self._leased - self._sent >= LARGE_ANSWER_BYTES

    def add(self, tx: Tx, size: int) -> None:
        """A delivery of about so many bytes is on its way. Writer's thread."""
        size += _OVERHEAD
        self._leased += size
        self.sizes.append(size)

        def undo() -> None:
            self._leased -= self.sizes.pop()

        tx.after_rollback(undo)

    def sent(self, count: int) -> bool:
        """So many deliveries have been sent, the oldest; whether the waiter was held back. Event loop."""
        self._sent += sum(self.sizes.popleft() for _ in range(count))
        return self.held_back


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

    def serve(self, tx: Tx, waiter: Waiter) -> Iterator[Ready]:
        """Takes credits for ready rollouts, most urgent first; the caller leases each before the next one."""
        if waiter.can_take(tx):
            for ready in self.ready(tx, waiter.queue_keys, waiter.labels, waiter.credits):
                if not waiter.can_take(tx):
                    return
                self._take(tx, waiter)
                yield ready

    def go_on(self, waiter: Waiter) -> None:
        """What a waiter was held back for has been sent; the caller then serves what is ready."""
        waiter.held_back = False
        self._line_up(waiter)

    def ready(self, tx: Tx, queue_keys: Iterable[int], labels: Labels | None, limit: int) -> Iterator[Ready]:
        """Rollouts that can be delivered now from these queues, most urgent first.

        They are read a few at a time, so none may change before the last one is taken.
        """
        sets = None if labels is None else self._catalog.label_sets_within(tx, labels)
        lines = []
        for queue_key in queue_keys:
            queue = self._catalog.queue_by_key(tx, queue_key)
            if not queue.paused and not self._catalog.run_by_key(tx, queue.run_key).paused:
                lines.append(_line(tx, queue_key, sets, limit))
        if len(lines) == 1:
            return lines[0]
        return islice(heapq.merge(*lines, key=lambda ready: (-ready.priority, ready.row.key)), limit)

    def idle_reason(self, tx: Tx, waiter: Waiter) -> str:
        """Why a waiter with credits gets nothing."""
        queues = [self._catalog.queue_by_key(tx, key) for key in waiter.queue_keys]
        paused = [queue.paused or self._catalog.run_by_key(tx, queue.run_key).paused for queue in queues]
        if all(paused):
            return "paused"
        if waiter.labels is not None and next(self.ready(tx, waiter.queue_keys, None, 1), None):
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


def within(found: Iterable[Ready]) -> Iterator[Ready]:
    """The first of the rollouts, as many as an answer holds; at least one."""
    size = 0
    for ready in found:
        yield ready
        size += len(ready.body) + _OVERHEAD
        if size >= LARGE_ANSWER_BYTES:
            return


def _line(tx: Tx, queue_key: int, label_sets: Iterable[int] | None, limit: int) -> Iterator[Ready]:
    """The head of a queue, read a few at a time."""
    found = 0
    while found < limit:
        size = min(limit - found, _READ_AT_ONCE)
        part = ready_rollouts(tx.connection, queue_key, label_sets, size, found)
        yield from part
        if len(part) < size:
            return
        found += size
