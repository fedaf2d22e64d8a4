"""When a worker that died starts again, and when it is given up; what it leaves behind is ended."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import grpc

from agl_grpc.client.channel import open_blocking_channel
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.v1 import store_service_pb2, store_service_pb2_grpc

log = logging.getLogger(__name__)

LONGEST_BACKOFF_SECONDS = 30.0
MOST_CRASHES = 5
"""A worker that dies so often in a row, never having taken a rollout, is given up, and all others with it."""

HEALTHY_SECONDS = 60.0
"""A worker that lived this long starts again with the first back-off."""


class WorkerStartError(Exception):
    """A worker says that it can never run, for example because the agent cannot be imported."""


@dataclass(frozen=True, slots=True)
class Start:
    """When a worker starts, after how many deaths in a row, and how many of them before any rollout."""

    due: float = field(default_factory=time.monotonic)
    failures: int = 0
    fruitless: int = 0


def start_again(
    config: RunnerConfig, name: str, last: Start, *, lived: float, took: bool, death: str
) -> Start:
    """The start after a death.

    Args:
        config: of the workers.
        name: the worker's id.
        last: the start that ended.
        lived: seconds that it lived.
        took: whether it had taken a rollout.
        death: how it ended, in words.

    Raises:
        WorkerStartError: it only ever dies.
    """
    failures = 1 if lived >= HEALTHY_SECONDS else last.failures + 1
    fruitless = 0 if took else last.fruitless + 1
    if fruitless >= MOST_CRASHES:
        raise WorkerStartError(
            f"worker {name} died {fruitless} times in a row before it took a rollout; the last one {death} "
            f"after {lived:.1f} s; its log says more"
        )
    pause = min(LONGEST_BACKOFF_SECONDS, config.restart_seconds * 2.0 ** (failures - 1))
    log.error(
        "worker %s %s after %.1f s; its rollouts are delivered again; restart in %g s",
        name, death, lived, pause,
    )  # fmt: skip
    return Start(time.monotonic() + pause, failures, fruitless)


def end_leases(store: str, worker_id: str) -> None:
    """Ends a dead worker's leases at once, so that nobody waits for their expiry.

    It counts as losing them: a rollout that kills every worker is given up after `max_redeliveries`.
    """
    request = store_service_pb2.ExpireLeasesRequest(worker_id=worker_id)
    with open_blocking_channel(store) as channel:
        try:
            store_service_pb2_grpc.StoreServiceStub(channel).ExpireLeases(request, timeout=5.0)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return  # the store has never heard of it
            log.warning(
                "the leases of %s could not be ended (%s); its rollouts come back when they expire",
                worker_id, error.code().name,
            )  # fmt: skip
