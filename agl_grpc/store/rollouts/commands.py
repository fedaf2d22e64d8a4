"""Orders to workers: rows, pushed at once and repeated until acknowledged (R12)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from agl_grpc.store.clock import SECOND
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import worker_pb2

CANCEL = int(worker_pb2.COMMAND_KIND_CANCEL)
DRAIN = int(worker_pb2.COMMAND_KIND_DRAIN)
RESOURCES = int(worker_pb2.COMMAND_KIND_RESOURCES)

KEEP = 24 * 3600 * SECOND
_MOST_PENDING = 1000
_MOST_PUSHED = 10_000
PAGE = 1000
"""Most commands that are read at once."""

Push = Callable[[worker_pb2.WorkerCommand], None]


class Commands:
    """Writes commands and hands them to the streams of this process.

    Rows are written in the writer's thread; `listen`, `unlisten` and the pushes belong to the event loop.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, list[Push]] = {}
        self._runs: dict[int, int] = {}
        self._pushed: OrderedDict[int, None] = OrderedDict()

    def listen(self, worker_key: int, run_key: int, push: Push) -> None:
        """Pushes the worker's commands from now on, after their commit; it works for this run."""
        self._runs[worker_key] = run_key
        self._listeners.setdefault(worker_key, []).append(push)

    def unlisten(self, worker_key: int, push: Push) -> None:
        """Ends `listen`."""
        listeners = self._listeners.get(worker_key, [])
        if push in listeners:
            listeners.remove(push)
        if not listeners:
            self._listeners.pop(worker_key, None)
            self._runs.pop(worker_key, None)

    def connected(self, run_key: int) -> list[int]:
        """Workers of a run with a stream open here."""
        return [worker_key for worker_key, of_run in list(self._runs.items()) if of_run == run_key]

    def add(
        self,
        tx: Tx,
        worker_key: int,
        kind: int,
        *,
        attempt_key: int | None = None,
        resource_key: int | None = None,
        reason: str = "",
    ) -> None:
        """Writes a command; it is pushed when the change is on disk."""
        command_id = tx.insert(
            "INSERT INTO worker_commands (worker_key, kind, attempt_key, resource_key, reason, create_time) "
            "VALUES (?, ?, ?, ?, ?, ?) RETURNING command_id",
            (worker_key, kind, attempt_key, resource_key, reason, tx.now),
        )
        (command,) = _select(tx.connection, "WHERE c.command_id = ?", command_id)

        tx.after_commit(lambda: self._push(worker_key, command))

    def _push(self, worker_key: int, command: worker_pb2.WorkerCommand) -> None:
        listeners = self._listeners.get(worker_key, ())
        if listeners:
            self._pushed[command.command_id] = None
            if len(self._pushed) > _MOST_PUSHED:
                self._pushed.popitem(last=False)
        for listener in list(listeners):
            listener(command)

    def has_listeners(self) -> bool:
        """Whether any worker has a stream open here."""
        return bool(self._listeners)

    def pass_on(self, worker_key: int, command: worker_pb2.WorkerCommand) -> None:
        """Pushes a command that another server wrote; this one's own were pushed when they were."""
        if self._pushed.pop(command.command_id, self) is self:
            for listener in list(self._listeners.get(worker_key, ())):
                listener(command)

    def order_drain(self, tx: Tx, worker_key: int, reason: str) -> None:
        """Orders a worker to leave, unless such an order waits already."""
        waits = tx.execute(
            "SELECT 1 FROM worker_commands WHERE worker_key = ? AND kind = ? LIMIT 1", (worker_key, DRAIN)
        ).fetchone()
        if waits is None:
            self.add(tx, worker_key, DRAIN, reason=reason)

    def announce_resources(self, tx: Tx, resource_key: int, worker_keys: Iterable[int]) -> None:
        """Tells workers of a new publication; an older announcement that nobody acknowledged is replaced."""
        for worker_key in worker_keys:
            tx.execute(
                "DELETE FROM worker_commands WHERE worker_key = ? AND kind = ?", (worker_key, RESOURCES)
            )
            self.add(tx, worker_key, RESOURCES, resource_key=resource_key, reason="new resources")


def pending(db: Connection, worker_key: int) -> list[worker_pb2.WorkerCommand]:
    """Commands not yet acknowledged, oldest first."""
    return _select(db, "WHERE c.worker_key = ? ORDER BY c.command_id LIMIT ?", worker_key, _MOST_PENDING)


def newer(db: Connection, after: int) -> list[tuple[int, worker_pb2.WorkerCommand]]:
    """Commands to all workers after a command's id, oldest first, with their workers' keys."""
    keys = db.execute(
        "SELECT command_id, worker_key FROM worker_commands WHERE command_id > ? ORDER BY command_id LIMIT ?",
        (after, PAGE),
    ).fetchall()
    found = _select(db, "WHERE c.command_id > ? ORDER BY c.command_id LIMIT ?", after, PAGE)
    return [(worker_key, command) for (_, worker_key), command in zip(keys, found, strict=True)]


def acknowledge(tx: Tx, worker_key: int, command_ids: Iterable[int]) -> None:
    """Forgets commands that were carried out."""
    tx.executemany(
        "DELETE FROM worker_commands WHERE command_id = ? AND worker_key = ?",
        [(command_id, worker_key) for command_id in command_ids],
    )


def forget_cancels(tx: Tx, worker_key: int, session_id: str) -> None:
    """Forgets orders to stop attempts of a worker's earlier sessions: that process is gone."""
    tx.execute(
        "DELETE FROM worker_commands WHERE worker_key = ? AND kind = ? AND attempt_key IN "
        "(SELECT attempt_key FROM attempts WHERE attempt_key = worker_commands.attempt_key AND "
        "session_id != ?)",
        (worker_key, CANCEL, session_id),
    )


def prune(tx: Tx, limit: int = 500) -> int:
    """Forgets commands older than 24 hours; returns how many."""
    return tx.execute(
        "DELETE FROM worker_commands WHERE command_id IN (SELECT command_id FROM "
        "(SELECT command_id, create_time FROM worker_commands ORDER BY command_id LIMIT ?) AS oldest "
        "WHERE create_time < ?)",
        (limit, tx.now - KEEP),
    ).rowcount


def _select(db: Connection, where: str, *values: object) -> list[worker_pb2.WorkerCommand]:
    rows = db.execute(
        "SELECT c.command_id, c.kind, r.rollout_id, a.attempt_id, s.resources_id, s.version, c.reason "
        "FROM worker_commands c LEFT JOIN attempts a ON a.attempt_key = c.attempt_key "
        "LEFT JOIN rollouts r ON r.rollout_key = a.rollout_key "
        f"LEFT JOIN resources s ON s.resource_key = c.resource_key {where}",
        values,
    )
    return [
        worker_pb2.WorkerCommand(
            command_id=row[0],
            kind=row[1],
            rollout_id=row[2] or "",
            attempt_id=row[3] or "",
            resources_id=row[4] or "",
            resources_version=row[5] or 0,
            reason=row[6],
        )
        for row in rows
    ]
