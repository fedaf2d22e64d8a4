"""R22: which publication of resources a rollout runs with."""

from __future__ import annotations

from collections import OrderedDict

from agl_grpc.store.errors import resource_missing
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import resources_pb2

_MOST_CACHED = 64


def latest_key(db: Connection, run_key: int) -> int | None:
    """The run's last publication in commit order; None = nothing is published yet."""
    (key,) = db.execute("SELECT max(resource_key) FROM resources WHERE run_key = ?", (run_key,)).fetchone()
    return None if key is None else int(key)


def named_key(db: Connection, run_key: int, resources_id: str, version: int) -> int:
    """A publication by id and version; version 0 = the newest.

    Raises:
        StoreError: RESOURCE_MISSING.
    """
    row = db.execute(
        "SELECT resource_key FROM resources WHERE resources_id = ? AND run_key = ? AND (version = ? "
        "OR ? = 0) "
        "ORDER BY version DESC LIMIT 1",
        (resources_id, run_key, version, version),
    ).fetchone()
    if row is None:
        raise resource_missing(resources_id, version)
    return int(row[0])


class ResourceCache:
    """The last publications as messages; they never change. Used in the writer's thread only."""

    def __init__(self) -> None:
        self._latest: dict[int, int | None] = {}
        self._sets: OrderedDict[int, tuple[resources_pb2.ResourceSet, int]] = OrderedDict()

    def forget(self) -> None:
        """Another server may have published something."""
        self._latest.clear()

    def latest(self, tx: Tx, run_key: int) -> int | None:
        """The run's last publication in commit order; None = nothing is published yet."""
        if run_key not in self._latest:
            self._latest[run_key] = latest_key(tx.connection, run_key)
        return self._latest[run_key]

    def published(self, tx: Tx, run_key: int) -> None:
        """Something was published: looks for the run's latest anew, also if that comes to nothing."""
        self._latest.pop(run_key, None)
        tx.catalog_changed()
        tx.after_rollback(lambda: self._latest.pop(run_key, None))

    def get(self, tx: Tx, resource_key: int) -> resources_pb2.ResourceSet:
        """The publication with this key, which exists."""
        return self._find(tx, resource_key)[0]

    def size(self, tx: Tx, resource_key: int) -> int:
        """Bytes of the publication with this key."""
        return self._find(tx, resource_key)[1]

    def _find(self, tx: Tx, resource_key: int) -> tuple[resources_pb2.ResourceSet, int]:
        found = self._sets.get(resource_key)
        if found is None:
            row = tx.execute("SELECT body FROM resources WHERE resource_key = ?", (resource_key,)).fetchone()
            found = self._sets[resource_key] = (resources_pb2.ResourceSet.FromString(row[0]), len(row[0]))
            tx.after_rollback(lambda: self._sets.pop(resource_key, None))
            if len(self._sets) > _MOST_CACHED:
                self._sets.popitem(last=False)
        return found
