"""Attempts: finding, changing and watching."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound
from agl_grpc.client.watch import Watched, watch
from agl_grpc.model.attempt import Attempt
from agl_grpc.model.enums import AttemptStatus, SortOrder
from agl_grpc.model.failure import Failure
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.times import to_timestamp
from agl_grpc.model.unset import UNSET, Unset
from agl_grpc.model.value import to_key_values
from agl_grpc.v1 import attempt_pb2
from agl_grpc.v1 import store_service_pb2 as pb

LATEST = "latest"


class AttemptCalls(Connection):
    """The client's methods for attempts."""

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str = "sequence_id",
        sort_order: SortOrder | str = SortOrder.ASCENDING,
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """Attempts of a rollout; ``limit`` -1 reads all pages. An unknown rollout has none."""
        request = pb.ListAttemptsRequest(
            rollout_id=rollout_id, order_by=sort_by, order=SortOrder(sort_order).number
        )
        try:
            return await self.query(
                self.bound.store.ListAttempts,
                request,
                lambda page: map(Attempt.from_proto, page.attempts),
                limit=limit,
                offset=offset,
            )
        except NotFound:
            return PaginatedResult(items=[], limit=limit, offset=offset, total=0)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The newest attempt of a rollout; ``None`` when the rollout is unknown or has none."""
        return await self.get_attempt_by_id(LATEST, rollout_id=rollout_id)

    async def get_attempt_by_id(self, attempt_id: str, *, rollout_id: str = "") -> Attempt | None:
        """One attempt; ``None`` when unknown."""
        try:
            request = pb.GetAttemptRequest(rollout_id=rollout_id, attempt_id=attempt_id)
            response = await self.call(self.bound.store.GetAttempt, request)
        except NotFound:
            return None
        return Attempt.from_proto(response.attempt) if response.HasField("attempt") else None

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | str | Unset = UNSET,
        worker_id: str | Unset = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
        *,
        failure: Failure | Unset = UNSET,
        lease_token: bytes = b"",
    ) -> Attempt:
        """Change what is given and nothing else; ``attempt_id`` may be ``latest``.

        The status of a leased attempt needs its ``lease_token``; without it `LeaseLost`.
        """
        changes: dict[str, Any] = {
            "status": UNSET if isinstance(status, Unset) else AttemptStatus.parse(status).number,
            "worker_id": worker_id,
            "last_heartbeat_time": UNSET
            if isinstance(last_heartbeat_time, Unset)
            else to_timestamp(last_heartbeat_time),
            "metadata": UNSET if isinstance(metadata, Unset) else to_key_values(metadata, "metadata"),
            "failure": UNSET if isinstance(failure, Unset) else failure.to_proto(),
        }
        given = {name: value for name, value in changes.items() if value is not UNSET}
        request = pb.UpdateAttemptRequest(
            attempt=attempt_pb2.Attempt(rollout_id=rollout_id, attempt_id=attempt_id, **given),
            lease_token=lease_token,
        )
        request.update_mask.paths.extend(given)
        response = await self.call(self.bound.store.UpdateAttempt, request)
        return Attempt.from_proto(response.attempt)

    def watch_attempts(
        self, *, rollout_ids: Sequence[str] = (), cursor: int = 0, run_id: str | None = None
    ) -> AsyncIterator[Watched[Attempt]]:
        """Attempts as they change, resumed by cursor after every disconnect."""
        request = pb.WatchAttemptsRequest(
            run_id=self.run_or_default(run_id), rollout_ids=rollout_ids, cursor=cursor
        )
        return watch(
            self,
            lambda bound: bound.store.WatchAttempts,
            request,
            lambda message: map(Attempt.from_proto, message.attempts),
        )
