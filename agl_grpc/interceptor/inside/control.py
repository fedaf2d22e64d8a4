"""The engine's line to TrainerService: makes itself known, watches policy versions, reports how far it is."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable

import grpc

from agl_grpc.v1 import policy_pb2, trainer_service_pb2, trainer_service_pb2_grpc

logger = logging.getLogger("agl_grpc.interceptor")

_RPC_TIMEOUT = 10.0
_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 5.0

OnVersion = Callable[[policy_pb2.PolicyVersion], Awaitable[None]]


class EngineControl:
    """Keeps the watch of policy versions open for as long as the engine lives, across restarts of the store.

    `active_version` answers the policy version that serves now.
    """

    def __init__(
        self, channel: grpc.aio.Channel, engine: policy_pb2.Engine, active_version: Callable[[], int]
    ) -> None:
        self._stub = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        self._engine = engine
        self._active_version = active_version
        self.current = asyncio.Event()
        """Set once the engine serves what the store says is committed, or cannot learn it now."""

    @property
    def model(self) -> str:
        """Whose versions are followed."""
        return self._engine.model

    async def run(self, on_version: OnVersion) -> None:
        """Register, then hand each change of a policy version to `on_version` in order, for ever."""
        pause = _FIRST_BACKOFF
        while True:
            try:
                await self._register()
                pause = _FIRST_BACKOFF
                await self._catch_up(on_version)
                self.current.set()
                await self._follow(on_version)
            except grpc.aio.AioRpcError as error:
                self.current.set()
                level = logging.DEBUG if error.code() is grpc.StatusCode.UNAVAILABLE else logging.WARNING
                logger.log(
                    level, "watch of policy versions ended: %s: %s", error.code().name, error.details()
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_BACKOFF)

    async def report(
        self, policy_version: int, phase: int, *, digest: str = "", error: str = "", pause_ns: int = 0
    ) -> None:
        """Tell the store a phase; while the store is away it is told again at registration what serves."""
        state = policy_pb2.EngineState(
            engine_id=self._engine.engine_id,
            policy_version=policy_version,
            phase=phase,  # type: ignore[arg-type]  # the field is the enum's integer on the wire
            weights_digest=digest,
            error=error[:4000],
            pause_ns=pause_ns,
        )
        try:
            await self._send(state)
        except grpc.aio.AioRpcError as failure:
            logger.warning("phase of policy version %d not reported: %s", policy_version, failure.details())

    async def serves_at(self, endpoint: str) -> None:
        """Name another endpoint, now and at every registration; a store that is away hears of it then."""
        self._engine.endpoint = endpoint
        try:
            await self._send(None)
        except grpc.aio.AioRpcError as failure:
            logger.warning("endpoint %s not reported: %s", endpoint, failure.details())

    async def _register(self) -> None:
        await self._send(None)

    async def _catch_up(self, on_version: OnVersion) -> None:
        """Hand over the newest committed version: the engine may have missed it while it was away."""
        request = trainer_service_pb2.GetPolicyVersionRequest(
            run_id=self._engine.run_id, model=self._engine.model
        )
        try:
            answer = await self._stub.GetPolicyVersion(request, timeout=_RPC_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return
            raise
        await on_version(answer.policy_version)

    async def _send(self, state: policy_pb2.EngineState | None) -> None:
        self._engine.active_policy_version = self._active_version()
        request = trainer_service_pb2.ReportEngineStateRequest(
            request_id=str(uuid.uuid4()), engine=self._engine, state=state
        )
        await self._stub.ReportEngineState(request, timeout=_RPC_TIMEOUT)

    async def _follow(self, on_version: OnVersion) -> None:
        request = trainer_service_pb2.WatchPolicyVersionsRequest(
            run_id=self._engine.run_id,
            model=self._engine.model,
            engine_id=self._engine.engine_id,
            include_existing=True,
        )
        async for answer in self._stub.WatchPolicyVersions(request):
            for version in answer.policy_versions:
                await on_version(version)
