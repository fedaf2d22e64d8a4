"""Text ids that become integers once: runs, queues, groups, label sets, workers.

Used in the writer's thread only. What a command that comes to nothing had added is forgotten again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.ids import is_valid_id
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import common_pb2

Labels = frozenset[tuple[str, str]]
_NO_LABELS = 0
_MAX_CACHED = 100_000


@dataclass(slots=True)
class RunRow:
    """What the rules need to know of a run; times in microseconds."""

    run_key: int
    run_id: str
    paused: bool
    seal_timeout: int
    graded: bool


@dataclass(slots=True)
class QueueRow:
    """A queue of a run."""

    queue_key: int
    run_key: int
    name: str
    paused: bool


class Catalog:
    """Keys of named things, cached."""

    def __init__(self) -> None:
        self._runs: dict[str, RunRow] = {}
        self._runs_by_key: dict[int, RunRow] = {}
        self._queues: dict[tuple[int, str], QueueRow] = {}
        self._queues_by_key: dict[int, QueueRow] = {}
        self._groups: dict[tuple[int, str], int] = {}
        self._workers: dict[str, int] = {}
        self._label_sets: dict[Labels, int] = {}
        self._notes: dict[int, tuple[bytes, int]] = {}

    def forget(self) -> None:
        """Reads again what another server may have changed; keys of workers never change."""
        self._runs.clear()
        self._runs_by_key.clear()
        self._queues.clear()
        self._queues_by_key.clear()
        self._label_sets.clear()
        self._groups.clear()

    def is_news(self, tx: Tx, worker_key: int, notes: bytes) -> bool:
        """Whether these notes about a worker must be written: they are new, or a second old."""
        known = self._notes.get(worker_key)
        if known is not None and known[0] == notes and tx.now - known[1] < SECOND:
            return False
        self._notes[worker_key] = (notes, tx.now)
        tx.after_rollback(lambda: self._notes.pop(worker_key, None))
        return True

    def run(self, tx: Tx, run_id: str) -> RunRow:
        """The run with this id; empty = `default`.

        Raises:
            StoreError: NOT_FOUND.
        """
        run_id = run_id or "default"
        run = self._runs.get(run_id)
        if run is None:
            run = self._load_run(tx, "run_id = ?", run_id)
            if run is None:
                raise not_found("run", run_id)
        return run

    def run_by_key(self, tx: Tx, run_key: int) -> RunRow:
        """The run with this key, which exists."""
        run = self._runs_by_key.get(run_key) or self._load_run(tx, "run_key = ?", run_key)
        assert run is not None, f"run {run_key} is missing"
        return run

    def _load_run(self, tx: Tx, where: str, value: str | int) -> RunRow | None:
        row = tx.execute(
            f"SELECT run_key, run_id, paused, seal_timeout, graders IS NOT NULL FROM runs WHERE {where}",
            (value,),
        ).fetchone()
        if row is None:
            return None
        run = RunRow(row[0], row[1], bool(row[2]), row[3], bool(row[4]))
        self._runs[run.run_id] = self._runs_by_key[run.run_key] = run
        tx.after_rollback(lambda: self.forget_run(run))
        return run

    def run_changed(self, tx: Tx, run: RunRow) -> None:
        """Reads the run again next time, here and on other servers."""
        self.forget_run(run)
        tx.after_rollback(lambda: self.forget_run(run))
        tx.catalog_changed()

    def forget_run(self, run: RunRow) -> None:
        """Reads the run again next time."""
        self._runs.pop(run.run_id, None)
        self._runs_by_key.pop(run.run_key, None)

    def queue(self, tx: Tx, run: RunRow, name: str) -> QueueRow:
        """The run's queue of this name, made if need be; empty = the run's own."""
        name = name or run.run_id
        queue = self._queues.get((run.run_key, name))
        if queue is None:
            tx.execute(
                "INSERT INTO queues (run_key, name) VALUES (?, ?) ON CONFLICT DO NOTHING", (run.run_key, name)
            )
            queue = self._load_queue(tx, "run_key = ? AND name = ?", run.run_key, name)
        return queue

    def queue_keys(self, tx: Tx, run: RunRow, names: Iterable[str]) -> tuple[int, ...]:
        """The run's queues of these names, none = its own; each once, though its own has two names."""
        keys = (self.queue(tx, run, name).queue_key for name in dict.fromkeys(names))
        return tuple(dict.fromkeys(keys)) or (self.queue(tx, run, "").queue_key,)

    def queue_by_key(self, tx: Tx, queue_key: int) -> QueueRow:
        """The queue with this key, which exists."""
        return self._queues_by_key.get(queue_key) or self._load_queue(tx, "queue_key = ?", queue_key)

    def _load_queue(self, tx: Tx, where: str, *values: str | int) -> QueueRow:
        row = tx.execute(
            f"SELECT queue_key, run_key, name, paused FROM queues WHERE {where}", values
        ).fetchone()
        queue = QueueRow(row[0], row[1], row[2], bool(row[3]))
        self._queues[queue.run_key, queue.name] = self._queues_by_key[queue.queue_key] = queue
        tx.after_rollback(lambda: self.forget_queue(queue))
        return queue

    def queue_changed(self, tx: Tx, queue: QueueRow) -> None:
        """Reads the queue again next time, here and on other servers."""
        self.forget_queue(queue)
        tx.after_rollback(lambda: self.forget_queue(queue))
        tx.catalog_changed()

    def forget_queue(self, queue: QueueRow) -> None:
        """Reads the queue again next time."""
        self._queues.pop((queue.run_key, queue.name), None)
        self._queues_by_key.pop(queue.queue_key, None)

    def group(self, tx: Tx, run_key: int, group_id: str) -> int | None:
        """The key of a group, made if need be; None for an empty id."""
        if not group_id:
            return None
        name = (run_key, group_id)
        key = self._groups.get(name)
        if key is None:
            tx.execute("INSERT INTO groups (run_key, group_id) VALUES (?, ?) ON CONFLICT DO NOTHING", name)
            (key,) = tx.execute(
                "SELECT group_key FROM groups WHERE run_key = ? AND group_id = ?", name
            ).fetchone()
            if len(self._groups) >= _MAX_CACHED:
                self._groups.clear()
            self._groups[name] = key
            tx.after_rollback(lambda: self._groups.pop(name, None))
        return key

    def group_deleted(self, tx: Tx, run_key: int, group_id: str) -> None:
        """Looks for the group anew next time, here and on other servers."""
        self._groups.pop((run_key, group_id), None)
        tx.catalog_changed()

    def worker(self, tx: Tx, worker_id: str) -> int | None:
        """The key of a worker, made if need be; None for an empty id."""
        if not worker_id:
            return None
        key = self._workers.get(worker_id)
        if key is None:
            tx.execute("INSERT INTO workers (worker_id) VALUES (?) ON CONFLICT DO NOTHING", (worker_id,))
            (key,) = tx.execute("SELECT worker_key FROM workers WHERE worker_id = ?", (worker_id,)).fetchone()
            if len(self._workers) >= _MAX_CACHED:
                self._workers.clear()
            self._workers[worker_id] = key
            tx.after_rollback(lambda: self._workers.pop(worker_id, None))
        return key

    def label_set(self, tx: Tx, labels: Labels) -> int:
        """The key of a set of labels, made if need be; 0 = no labels."""
        if not labels:
            return _NO_LABELS
        self._load_label_sets(tx)
        key = self._label_sets.get(labels)
        if key is None:
            key = tx.insert(
                "INSERT INTO label_sets (labels) VALUES (?) RETURNING label_set_key",
                (_encode_labels(labels),),
            )
            tx.catalog_changed()
            self._label_sets[labels] = key
            tx.after_rollback(lambda: self._label_sets.pop(labels, None))
        return key

    def label_sets_within(self, tx: Tx, labels: Labels) -> set[int]:
        """Keys of the sets whose labels are all among these, the empty set included."""
        self._load_label_sets(tx)
        return {_NO_LABELS, *(key for known, key in self._label_sets.items() if known <= labels)}

    def _load_label_sets(self, tx: Tx) -> None:
        if not self._label_sets:
            for key, blob in tx.execute("SELECT label_set_key, labels FROM label_sets"):
                self._label_sets[decode_labels(blob)] = key


def labels_of(labels: Iterable[common_pb2.Label], path: str) -> Labels:
    """Checked labels as a set.

    Raises:
        StoreError: A key is empty.
    """
    found = frozenset((label.key, label.value) for label in labels)
    if any(not key for key, _ in found):
        raise invalid_field(path, "has an empty key")
    return found


def _encode_labels(labels: Labels) -> bytes:
    ordered = [common_pb2.Label(key=key, value=value) for key, value in sorted(labels)]
    # Any message with repeated labels would do; keys and values cannot be told apart by joining them.
    return b"".join(len(data := label.SerializeToString()).to_bytes(4, "big") + data for label in ordered)


def decode_labels(blob: bytes) -> Labels:
    """Labels as they are stored in `label_sets`."""
    found = []
    place = 0
    while place < len(blob):
        size = int.from_bytes(blob[place : place + 4], "big")
        label = common_pb2.Label.FromString(blob[place + 4 : place + 4 + size])
        found.append((label.key, label.value))
        place += 4 + size
    return frozenset(found)


def require_id(value: str, path: str) -> str:
    """Checks an id that a caller chose.

    Raises:
        StoreError: INVALID_FIELD.
    """
    if not is_valid_id(value):
        raise invalid_field(path, "must be 1 to 128 characters of [A-Za-z0-9._:-]")
    return value
