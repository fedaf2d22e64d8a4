"""Resources: publish, get, latest, list, watch."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import PageRequest, check_size, fetch_page, order_of
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.events.watches import LogEntry, LogWatch
from agl_grpc.store.handlers.common import change
from agl_grpc.store.resources import RESOURCES, check_resources, load_resources, publish
from agl_grpc.store.rollouts.bindings import latest_key
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import store_service_pb2

_COLUMNS = {
    "update_time": "s.update_time",
    "create_time": "s.create_time",
    "resources_id": "s.resources_id",
    "version": "s.version",
}
_NEWEST = (
    "NOT EXISTS (SELECT 1 FROM resources n WHERE n.resources_id = s.resources_id AND n.version > s.version)"
)


class ResourceHandlers:
    """Serves the methods about resources."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store

    async def publish_resources(
        self, request: store_service_pb2.PublishResourcesRequest, call: Call
    ) -> bytes:
        """A new version; workers and watchers are told at once."""
        check_resources(request.resources)

        def run(tx: Tx) -> store_service_pb2.PublishResourcesResponse:
            run_row = self._side.catalog.run(tx, request.run_id)
            key, made = publish(tx, run_row, request.resources_id, request.resources)
            self._side.moves.resources.published(tx, run_row.run_key)
            workers = self._side.commands.connected(run_row.run_key)
            self._side.commands.announce_resources(tx, key, workers)
            return store_service_pb2.PublishResourcesResponse(resources=made)

        return await change(self._store, call, request, run, 4)

    async def get_resources(
        self, request: store_service_pb2.GetResourcesRequest, _call: Call
    ) -> store_service_pb2.GetResourcesResponse:
        """One version of a set."""

        def read(db: Connection) -> store_service_pb2.GetResourcesResponse:
            row = db.execute(
                "SELECT resource_key FROM resources WHERE resources_id = ? AND (version = ? OR ? = 0) "
                "ORDER BY version DESC LIMIT 1",
                (request.resources_id, request.version, request.version),
            ).fetchone()
            if row is None:
                name = request.resources_id
                raise not_found("resources", f"{name} version {request.version}" if request.version else name)
            (found,) = load_resources(db, [row[0]])
            return store_service_pb2.GetResourcesResponse(resources=found)

        return await self._store.read(read)

    async def get_latest_resources(
        self, request: store_service_pb2.GetLatestResourcesRequest, call: Call
    ) -> store_service_pb2.GetLatestResourcesResponse:
        """The run's last publication in commit order."""
        call.caller.require_run(request.run_id)

        def read(db: Connection) -> store_service_pb2.GetLatestResourcesResponse:
            answer = store_service_pb2.GetLatestResourcesResponse(position=position(db))
            key = latest_key(db, _one_run(db, request.run_id))
            if key is not None:
                answer.resources.CopyFrom(load_resources(db, [key])[0])
            return answer

        return await self._store.read(read)

    async def list_resources(
        self, request: store_service_pb2.ListResourcesRequest, _call: Call
    ) -> store_service_pb2.ListResourcesResponse:
        """Publications of a run."""
        wanted = PageRequest(
            check_size(request.page_size), request.page_token, request.skip, request.include_total
        )
        order = order_of(request.order_by, request.order, _COLUMNS, "s.resource_key", "update_time")

        def read(db: Connection) -> store_service_pb2.ListResourcesResponse:
            where, values = _condition(request, run_key_of(db, request.run_id))
            page = fetch_page(db, "resources s", where, values, order, wanted)
            # A page ends early when its sets are large.
            listed = load_resources(db, page.keys)
            return store_service_pb2.ListResourcesResponse(
                resources=listed,
                next_page_token=page.token_after(len(listed)),
                total_size=page.total,
            )

        return await self._store.read(read)

    async def watch_resources(
        self, request: store_service_pb2.WatchResourcesRequest, _call: Call
    ) -> AsyncIterator[store_service_pb2.WatchResourcesResponse | bytes]:
        """Publications as they are made, in commit order."""
        if request.include_latest and request.cursor:
            raise invalid_field("cursor", "must be 0 with include_latest")
        run_key = await self._store.read(lambda db: _one_run(db, request.run_id))

        def build(db: Connection, entries: list[LogEntry]) -> store_service_pb2.WatchResourcesResponse:
            found = load_resources(db, [entry.ref for entry in entries])
            return store_service_pb2.WatchResourcesResponse(resources=found)

        watch = LogWatch(self._store, RESOURCES, run_key, build, shared=())
        if request.include_latest:
            first = await self._store.read(lambda db: _latest(db, run_key))
            cursor = first.cursor
        else:
            cursor = await watch.start(request.cursor)
            first = store_service_pb2.WatchResourcesResponse(cursor=cursor, checkpoint=True)
        yield first
        async for found in watch.follow(cursor):
            yield found.answer or store_service_pb2.WatchResourcesResponse(
                checkpoint=True, cursor=found.cursor
            )


def _one_run(db: Connection, run_id: str) -> int:
    key = run_key_of(db, run_id)
    if key is None:
        raise invalid_field("run_id", "must name one run")
    return key


def _latest(db: Connection, run_key: int) -> store_service_pb2.WatchResourcesResponse:
    """The last publication with the position that it was read at; a checkpoint when there is none yet."""
    key = latest_key(db, run_key)
    return store_service_pb2.WatchResourcesResponse(
        resources=load_resources(db, [] if key is None else [key]),
        cursor=position(db),
        checkpoint=key is None,
    )


def _condition(
    request: store_service_pb2.ListResourcesRequest, run_key: int | None
) -> tuple[str, list[object]]:
    where, values = ["TRUE"], list[object]()
    if run_key is not None:
        where.append("s.run_key = ?")
        values.append(run_key)
    if request.resources_id:
        where.append("s.resources_id = ?")
        values.append(request.resources_id)
    if request.resources_id_contains:
        where.append("instr(s.resources_id, ?) > 0")
        values.append(request.resources_id_contains)
    if not request.all_versions:
        where.append(_NEWEST)
    return " AND ".join(where), values
