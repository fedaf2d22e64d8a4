"""The rollouts that a worker has in hand."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field

from agl_grpc.client import LeasedRollout


class StopReason(enum.Enum):
    """Why an agent is stopped before it ended by itself."""

    CANCELLED = "its rollout was cancelled"
    LOST = "its lease is lost"
    RELEASED = "its worker leaves"


def _future() -> asyncio.Future[StopReason]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class Held:
    """One leased rollout, from its delivery until the store has taken its end."""

    work: LeasedRollout
    """As delivered."""
    stop: asyncio.Future[StopReason] = field(default_factory=_future)
    """Resolved when the agent has to stop and nothing more may be written."""
    ended: bool = False
    """Whether the agent has ended; its result is on its way to the store."""

    @property
    def attempt_id(self) -> str:
        """The attempt, which is the lease's fencing epoch."""
        return self.work.attempt_id

    @property
    def rollout_id(self) -> str:
        """The rollout."""
        return self.work.rollout.rollout_id

    def stop_because(self, reason: StopReason) -> None:
        """Tells the agent to stop; the first reason counts."""
        if not self.stop.done():
            self.stop.set_result(reason)
