"""Workers and their leases: what an operator sees and does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound
from agl_grpc.client.filters import excludes_everything
from agl_grpc.model.enums import FilterLogic, SortOrder, WorkerStatus, number_of
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.unset import UNSET, Unset
from agl_grpc.model.value import to_key_values
from agl_grpc.model.worker import LeaseInfo, Worker
from agl_grpc.v1 import runner_service_pb2
from agl_grpc.v1 import store_service_pb2 as pb


class WorkerCalls(Connection):
    """The client's methods for workers."""

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus | str] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic | str = FilterLogic.AND,
        sort_by: str | None = None,
        sort_order: SortOrder | str = SortOrder.ASCENDING,
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        """Workers that were ever heard of; an empty list of allowed states matches nothing."""
        if excludes_everything(status_in, logic=filter_logic, others=bool(worker_id_contains)):
            return PaginatedResult(items=[], limit=limit, offset=offset, total=0)
        request = pb.ListWorkersRequest(
            status_in=[WorkerStatus.parse(status).number for status in status_in or ()],
            worker_id_contains=worker_id_contains or "",
            logic=FilterLogic.parse(filter_logic).number,
            order_by=sort_by or "",
            order=SortOrder(sort_order).number,
        )
        return await self.query(
            self.bound.store.ListWorkers,
            request,
            lambda page: map(Worker.from_proto, page.workers),
            limit=limit,
            offset=offset,
        )

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """One worker; ``None`` when unknown."""
        try:
            response = await self.call(self.bound.store.GetWorker, pb.GetWorkerRequest(worker_id=worker_id))
        except NotFound:
            return None
        return Worker.from_proto(response.worker)

    async def update_worker(
        self,
        worker_id: str,
        heartbeat_stats: Mapping[str, Any] | Unset = UNSET,
        *,
        status: WorkerStatus | str | None = None,
        idle_reason: str = "",
    ) -> Worker:
        """Give a sign of life, with a snapshot of the machine when one is given."""
        stats = None if isinstance(heartbeat_stats, Unset) else heartbeat_stats
        request = runner_service_pb2.HeartbeatRequest(
            worker_id=worker_id,
            stats=to_key_values(stats, "heartbeat_stats"),
            keep_stats=stats is None,
            status=number_of(WorkerStatus.parse(status) if status else None),
            idle_reason=idle_reason,
        )
        response = await self.call(self.bound.runner.Heartbeat, request)
        return Worker.from_proto(response.worker)

    async def query_leases(
        self, *, worker_id: str | None = None, run_id: str | None = None
    ) -> list[LeaseInfo]:
        """Live leases of a run, or of one worker in it."""
        request = pb.ListLeasesRequest(run_id=self.run_or_default(run_id), worker_id=worker_id or "")
        return await self.read_all(
            self.bound.store.ListLeases, request, lambda page: map(LeaseInfo.from_proto, page.leases)
        )

    async def expire_leases(
        self, attempt_ids: Sequence[str] = (), *, worker_id: str | None = None
    ) -> list[str]:
        """End leases now, as if they had run out; answers the attempts that lost theirs."""
        request = pb.ExpireLeasesRequest(attempt_ids=attempt_ids, worker_id=worker_id or "")
        return list((await self.call(self.bound.store.ExpireLeases, request)).attempt_ids)

    async def drain_workers(self, worker_ids: Sequence[str], *, reason: str = "") -> list[str]:
        """Order workers to finish what they hold, take nothing new and leave; answers who was told."""
        request = pb.DrainWorkersRequest(worker_ids=worker_ids, reason=reason)
        return list((await self.call(self.bound.store.DrainWorkers, request)).worker_ids)
