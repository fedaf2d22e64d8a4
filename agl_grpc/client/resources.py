"""Resources: publishing, finding and watching."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound
from agl_grpc.client.watch import Watched, watch
from agl_grpc.model.enums import SortOrder
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.resource import NamedResources, ResourcesUpdate, resources_to_proto
from agl_grpc.v1 import store_service_pb2 as pb


class ResourceCalls(Connection):
    """The client's methods for resources."""

    async def add_resources(self, resources: NamedResources, *, run_id: str | None = None) -> ResourcesUpdate:
        """Publish resources under a new id; they become the run's latest."""
        return await self._publish("", resources, run_id)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, run_id: str | None = None
    ) -> ResourcesUpdate:
        """Publish the next version of an id; it becomes the run's latest."""
        return await self._publish(resources_id, resources, run_id)

    async def _publish(
        self, resources_id: str, resources: NamedResources, run_id: str | None
    ) -> ResourcesUpdate:
        request = pb.PublishResourcesRequest(
            run_id=self.run_or_default(run_id),
            resources_id=resources_id,
            resources=resources_to_proto(resources),
        )
        response = await self.call(self.bound.store.PublishResources, request)
        return ResourcesUpdate.from_proto(response.resources)

    async def get_resources_by_id(self, resources_id: str, *, version: int = 0) -> ResourcesUpdate | None:
        """One version of an id, the newest for 0; ``None`` when unknown."""
        try:
            request = pb.GetResourcesRequest(resources_id=resources_id, version=version)
            response = await self.call(self.bound.store.GetResources, request)
        except NotFound:
            return None
        return ResourcesUpdate.from_proto(response.resources)

    async def get_latest_resources(self, *, run_id: str | None = None) -> ResourcesUpdate | None:
        """The run's last publication; ``None`` when there is none yet."""
        request = pb.GetLatestResourcesRequest(run_id=self.run_or_default(run_id))
        response = await self.call(self.bound.store.GetLatestResources, request)
        return ResourcesUpdate.from_proto(response.resources) if response.HasField("resources") else None

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder | str = SortOrder.ASCENDING,
        limit: int = -1,
        offset: int = 0,
        all_versions: bool = False,
        run_id: str | None = None,
    ) -> PaginatedResult[ResourcesUpdate]:
        """Publications of a run, the newest version of each id unless all are asked for."""
        request = pb.ListResourcesRequest(
            run_id=self.run_or_default(run_id),
            resources_id=resources_id or "",
            resources_id_contains=resources_id_contains or "",
            all_versions=all_versions,
            order_by=sort_by or "",
            order=SortOrder(sort_order).number,
        )
        return await self.query(
            self.bound.store.ListResources,
            request,
            lambda page: map(ResourcesUpdate.from_proto, page.resources),
            limit=limit,
            offset=offset,
        )

    def watch_resources(
        self, *, cursor: int = 0, include_latest: bool = False, run_id: str | None = None
    ) -> AsyncIterator[Watched[ResourcesUpdate]]:
        """Publications as they are made, resumed by cursor after every disconnect."""
        request = pb.WatchResourcesRequest(
            run_id=self.run_or_default(run_id), cursor=cursor, include_latest=include_latest
        )
        return watch(
            self,
            lambda bound: bound.store.WatchResources,
            request,
            lambda message: map(ResourcesUpdate.from_proto, message.resources),
        )
