"""REST: workers, statistics, health."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2

from agl_grpc.store import limits
from agl_grpc.store.door.fields import check_request
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.errors import StoreError
from agl_grpc.store.http.problems import invalid
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.lists import envelope, list_fields, logic, nothing, paging
from agl_grpc.store.http.rest.rollouts import notes_of
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import common_pb2, runner_service_pb2, store_service_pb2

SORTABLE = (
    "worker_id",
    "status",
    "last_heartbeat_time",
    "last_dequeue_time",
    "last_busy_time",
    "last_idle_time",
    "current_rollout_id",
    "current_attempt_id",
)
"""Fields by which workers can be sorted."""


class WorkerRoutes:
    """Serves the routes about workers and about the store itself."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path below the API's prefix."""
        return {
            ("GET", "/health"): self.health,
            ("GET", "/statistics"): self.statistics,
            ("GET", "/workers"): self.search,
            ("POST", "/workers/search"): self.search,
            ("GET", "/workers/{worker_id}"): self.get,
            ("POST", "/workers/{worker_id}"): self.update,
        }

    async def health(self, _http: Request) -> Answer:
        """Whether the server serves."""
        if self._methods.draining.is_set():
            return Answer(b'{"status":"draining"}', 503)
        return Answer(b'{"status":"ok"}')

    async def statistics(self, http: Request) -> Answer:
        """Counts and sizes."""
        response = await self._methods(store_service_pb2.GetStatisticsRequest(), http.metadata)
        return Answer(show.dump(show.statistics(response)))

    async def search(self, http: Request) -> Answer:
        """Workers by filter."""
        fields = await list_fields(http, ("status_in",))
        chosen = paging(fields, SORTABLE)
        statuses = fields.text_items("status_in", show.WORKER_STATUSES)
        contains, combined = fields.text("worker_id_contains") or "", logic(fields)
        request = store_service_pb2.ListWorkersRequest(
            status_in=[show.WORKER_STATUSES[name] for name in statuses or ()],
            worker_id_contains=contains,
            logic=combined,
        )
        if statuses == [] and (combined == common_pb2.FILTER_LOGIC_AND or not contains):
            check_request(request)
            return nothing(chosen)
        return await envelope(
            *(self._methods, http, request, chosen, limits.PAGE_SIZE), lambda page: page.workers, show.worker
        )

    async def get(self, http: Request) -> Answer:
        """One worker; null when it was never heard of."""
        request = store_service_pb2.GetWorkerRequest(worker_id=http.names["worker_id"])
        try:
            response = await self._methods(request, http.metadata)
        except StoreError as error:
            if error.code != code_pb2.NOT_FOUND:
                raise
            return Answer(b"null")
        return Answer(show.dump(show.worker(response.worker)))

    async def update(self, http: Request) -> Answer:
        """A worker's sign of life."""
        fields = Fields(await http.optional_json())
        if fields.has("heartbeat_stats") and fields.values["heartbeat_stats"] is None:
            raise invalid("heartbeat_stats", "is invalid; it cannot be a null value.")
        request = runner_service_pb2.HeartbeatRequest(
            worker_id=http.names["worker_id"],
            stats=notes_of(fields, "heartbeat_stats"),
            keep_stats=not fields.has("heartbeat_stats"),
        )
        response = await self._methods(request, http.metadata)
        return Answer(show.dump(show.worker(response.worker)))
