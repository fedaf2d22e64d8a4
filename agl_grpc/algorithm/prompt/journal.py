"""What an algorithm has done so far, in the store: it survives the process, and anyone can read it.

Each entry is a publication of resources under one id, so that it is durable before the next step begins.
Beside
the entry a publication holds the best resources known, so that "the latest" is always good to work with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agl_grpc.client import StoreClient
from agl_grpc.model import NamedResources, Resource, register_resource

RECORD = "algorithm_record"
SUFFIX = "-journal"


@register_resource
@dataclass(slots=True, kw_only=True)
class AlgorithmRecord(Resource):
    """A step that an algorithm has finished.

    ``key`` names the step within the run, ``kind`` what it was (``candidate``, ``critique``, ``score``,
    …), and ``data`` holds what came of it.
    """

    resource_type: ClassVar[str] = RECORD

    key: str
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The entries of one run in the order in which they were made; `open` reads those that are there.

    Args:
        store: client of the run.
        journal_id: the resources' id under which it is kept.
    """

    def __init__(self, store: StoreClient, journal_id: str) -> None:
        self._store = store
        self._id = journal_id
        self._lock = asyncio.Lock()
        self.records: dict[str, AlgorithmRecord] = {}
        self.resources: NamedResources = {}

    async def open(self) -> int:
        """Reads the entries of earlier processes; how many there are."""
        self.records = {record.key: record for record in await read_records(self._store, self._id)}
        return len(self.records)

    def get(self, key: str) -> dict[str, Any] | None:
        """What came of a step; None = it is not finished."""
        record = self.records.get(key)
        return None if record is None else record.data

    def of_kind(self, kind: str) -> list[AlgorithmRecord]:
        """Entries of a kind."""
        return [record for record in self.records.values() if record.kind == kind]

    async def put(self, kind: str, key: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Writes an entry; it is on disk when this returns."""
        record = AlgorithmRecord(key=key, kind=kind, data=dict(data))
        async with self._lock:  # one after the other, so that the order of entries is that of their keys here
            await self._store.update_resources(self._id, {**self.resources, RECORD: record})
            self.records[key] = record
        return record.data

    async def publish_best(self) -> None:
        """Makes the best resources known the run's latest again, after something else was published."""
        async with self._lock:
            await self._store.update_resources(self._id, self.resources)

    async def once(
        self, kind: str, key: str, work: Callable[[], Awaitable[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """What came of a step: from the journal, else by doing it now and writing it down."""
        done = self.get(key)
        return done if done is not None else await self.put(kind, key, await work())


def journal_id(run_id: str, algorithm: str) -> str:
    """The resources' id of a run's journal."""
    return f"{run_id}-{algorithm}{SUFFIX}"


async def read_records(store: StoreClient, resources_id: str) -> list[AlgorithmRecord]:
    """The entries of a journal, oldest first; none when there is no such journal."""
    published = await store.query_resources(resources_id=resources_id, all_versions=True)
    found = [update.resources.get(RECORD) for update in sorted(published, key=lambda item: item.version)]
    return [record for record in found if isinstance(record, AlgorithmRecord)]
