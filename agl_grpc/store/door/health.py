"""Health of the server's services, by gRPC's own protocol for it; watches end when the server drains.

The servicer that comes with gRPC leaves watches open for ever: one of them would use up the whole grace of a
drain.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = Any  # grpc.aio.ServicerContext, or the door's own
Status = int
# The stubs lack what List says.
_messages: Any = health_pb2


class Health(health_pb2_grpc.HealthServicer):
    """Serves Check, List and Watch."""

    def __init__(self) -> None:
        self._status: dict[str, Status] = {}
        self._changed = asyncio.Event()
        self._leaving = False

    async def set(self, service: str, status: Status) -> None:
        """Says how a service is; once the server leaves nothing changes any more."""
        if not self._leaving:
            self._status[service] = status
            self._tell()

    async def enter_graceful_shutdown(self) -> None:
        """All services are NOT_SERVING from now on; watches say so and end."""
        self._leaving = True
        self._status = dict.fromkeys(self._status, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # Named as the rpcs; the generated base is for servers of threads.

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """How a service is now."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, _request: Any, _context: Context) -> Any:
        """How all services are now."""
        answer = _messages.HealthListResponse()
        for name, status in self._status.items():
            answer.statuses[name].status = status
        return answer

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """How a service is, now and whenever that changes."""
        told: Status | None = None
        while True:
            changed, leaving = self._changed, self._leaving
            status = self._status.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if leaving:
                return
            await changed.wait()
