"""The policy version in force, as the store says."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from agl_grpc.v1 import policy_pb2, trainer_service_pb2, trainer_service_pb2_grpc

logger = logging.getLogger("agl_grpc.interceptor")

_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 5.0


class PolicyVersions:
    """Follows the committed policy versions of a run; `initial` counts where the store knows none."""

    def __init__(self, channel: grpc.aio.Channel, run_id: str, initial: int) -> None:
        self._stub: Any = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        self._run_id = run_id
        self._initial = (initial, "")
        self._committed: dict[str, tuple[int, str]] = {}
        self._task = asyncio.create_task(self._follow())

    def current(self, model: str) -> tuple[int, str]:
        """Version and weights digest in force for a model."""
        return self._committed.get(model, self._initial)

    def describe(self) -> dict[str, int]:
        """Committed versions by model."""
        return {model: version for model, (version, _) in self._committed.items()}

    async def close(self) -> None:
        """Stop following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        pause = _FIRST_BACKOFF
        while True:
            request = trainer_service_pb2.WatchPolicyVersionsRequest(
                run_id=self._run_id, include_existing=True
            )
            try:
                async for answer in self._stub.WatchPolicyVersions(request):
                    pause = _FIRST_BACKOFF
                    for version in answer.policy_versions:
                        if version.status == policy_pb2.POLICY_VERSION_STATUS_COMMITTED:
                            self._committed[version.model] = (version.policy_version, version.weights_digest)
            except grpc.aio.AioRpcError as error:
                logger.debug("watch of policy versions ended: %s", error.details())
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_BACKOFF)
