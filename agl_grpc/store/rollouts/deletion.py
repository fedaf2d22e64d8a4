"""Finished rollouts deleted with all that belongs to them, a few in one transaction (R24)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agl_grpc.store.rollouts.attempts import ROLLOUT
from agl_grpc.store.rollouts.lifecycle import ROLLOUT_TERMINAL
from agl_grpc.store.rollouts.rows import RolloutRow, rollouts_where
from agl_grpc.store.storage.catalog import Catalog
from agl_grpc.store.storage.sql import marks
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2

STEP = 200
"""Most rollouts that are looked at in one transaction."""

_BUDGET_SECONDS = 0.02
_DELETED = int(event_pb2.EVENT_KIND_DELETED)
_PAUSE_MICROS = 1000

DeleteHook = Callable[[Tx, int, list[int]], None]
PinHook = Callable[[Tx, int], bool]


@dataclass
class Deleted:
    """What became of some rollouts.

    Attributes:
        deleted: How many went (or would go).
        kept: How many must stay.
        last_key: The last rollout that was looked at; others may have been left for another transaction.
    """

    deleted: int = 0
    kept: int = 0
    last_key: int = 0


class Deletion:
    """Deletes rollouts.

    Attributes:
        on_delete: Called with a rollout's key and its attempts' keys before these rows go.
        is_pinned: Whether a rollout's key must be kept.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.on_delete: list[DeleteHook] = []
        self.is_pinned: list[PinHook] = []

    def delete(self, tx: Tx, rows: Sequence[RolloutRow], *, dry_run: bool = False) -> Deleted:
        """Deletes those of the rollouts that are finished, sealed and not pinned.

        Stops early when it has taken long enough, at least one rollout later.
        """
        end = time.monotonic() + _BUDGET_SECONDS
        done = Deleted()
        gone: list[int] = []
        groups: set[int] = set()
        for row in rows:
            done.last_key = row.key
            finished = row.status in ROLLOUT_TERMINAL and row.sealed
            if not finished or any(pinned(tx, row.key) for pinned in self.is_pinned):
                done.kept += 1
            else:
                done.deleted += 1
                if not dry_run:
                    gone += self._delete(tx, row, groups)
            if time.monotonic() >= end:
                break
        self._tidy(tx, gone, groups)
        return done

    def _delete(self, tx: Tx, row: RolloutRow, groups: set[int]) -> list[int]:
        keys = [
            key for (key,) in tx.execute("SELECT attempt_key FROM attempts WHERE rollout_key = ?", (row.key,))
        ]
        for hook in self.on_delete:
            hook(tx, row.key, keys)
        (group_key,) = tx.execute(
            "SELECT group_key FROM rollouts WHERE rollout_key = ?", (row.key,)
        ).fetchone()
        if group_key is not None:
            groups.add(group_key)
        tx.execute("DELETE FROM attempts WHERE rollout_key = ?", (row.key,))
        tx.execute("DELETE FROM rollout_bodies WHERE rollout_key = ?", (row.key,))
        tx.execute("DELETE FROM rollouts WHERE rollout_key = ?", (row.key,))
        tx.event(row.run_key, ROLLOUT, _DELETED, row.key, entity_id=row.rollout_id)
        return keys

    def _tidy(self, tx: Tx, attempt_keys: Sequence[int], groups: set[int]) -> None:
        """Forgets what pointed to deleted rows: orders to workers, what workers last did, empty groups."""
        for start in range(0, len(attempt_keys), STEP):
            part = attempt_keys[start : start + STEP]
            some = marks(len(part))
            tx.execute(f"DELETE FROM worker_commands WHERE attempt_key IN ({some})", part)
            tx.execute(
                f"UPDATE workers SET current_attempt_key = NULL WHERE current_attempt_key IN ({some})", part
            )
        for group_key in groups:
            gone = tx.execute(
                "DELETE FROM groups WHERE group_key = ? AND NOT EXISTS "
                "(SELECT 1 FROM rollouts r WHERE r.group_key = groups.group_key) RETURNING run_key, group_id",
                (group_key,),
            ).fetchall()
            for run_key, group_id in gone:
                self._catalog.group_deleted(tx, run_key, group_id)


class Retention:
    """Deletes in the background what runs no longer keep: rollouts that ended longer ago than they say.

    It walks through each run's rollouts, oldest first, a few in one transaction. Those that must stay are
    passed by; the more there are, the longer it rests before it looks at them again.
    """

    def __init__(self, deletion: Deletion) -> None:
        self._deletion = deletion
        self._walks: dict[int, _Walk] = {}

    def prune(self, tx: Tx, limit: int) -> int:
        """Deletes some; returns `limit` when there may be more to do now, else less."""
        runs = tx.execute("SELECT run_key, retention FROM runs WHERE retention IS NOT NULL").fetchall()
        for run_key, retention in runs:
            walk = self._walks.setdefault(run_key, _Walk())
            if tx.now >= walk.rest_until and self._step(tx, run_key, retention, walk):
                return limit
        return 0

    def _step(self, tx: Tx, run_key: int, retention: int, walk: _Walk) -> bool:
        """A step of a walk; returns whether it goes on at once."""
        oldest_kept = tx.now - retention
        found = tx.execute(
            "SELECT rollout_key, create_time, end_time FROM rollouts WHERE run_key = ? AND rollout_key > ? "
            "ORDER BY rollout_key LIMIT ?",
            (run_key, walk.last_key, STEP),
        ).fetchall()
        # Keys rise with creation: behind a rollout that is young all are.
        old = [(key, end) for key, create, end in found if create < oldest_kept]
        if not old:
            walk.rest_until = tx.now + walk.kept * _PAUSE_MICROS
            walk.last_key = walk.kept = 0
            return False
        due = [key for key, end in old if end is not None and end < oldest_kept]
        last = old[-1][0]
        if due:
            some = marks(len(due))
            rows = rollouts_where(tx.connection, f"WHERE rollout_key IN ({some}) ORDER BY rollout_key", *due)
            done = self._deletion.delete(tx, rows)
            last = last if done.last_key == due[-1] else done.last_key
            walk.kept -= done.deleted
        walk.kept += sum(1 for key, _ in old if key <= last)
        walk.last_key = last
        return True


@dataclass
class _Walk:
    """How far the walk through a run's rollouts has come."""

    last_key: int = 0
    kept: int = 0
    rest_until: int = 0
