"""The leases that a worker has, and what becomes of them."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from agl_grpc.client import LeasedRollout
from agl_grpc.model import Lease


class StopReason(enum.Enum):
    """Why an agent is stopped before it ended by itself."""

    CANCELLED = "its rollout was cancelled"
    LOST = "its lease is lost"
    RELEASED = "its worker leaves"


@dataclass(slots=True, eq=False)
class Held:
    """One leased rollout, from its delivery until the store has taken its end."""

    work: LeasedRollout
    """As delivered."""
    expires: float
    """When the lease ends unless renewed, on this machine's monotonic clock."""
    stop: asyncio.Future[StopReason] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Resolved when the agent has to stop."""
    finished: bool = False
    """Whether the agent has ended; its result is on its way to the store."""
    overdue: bool = False
    """Whether its expiry has been reported."""

    @property
    def attempt_id(self) -> str:
        """The attempt, which is the lease's fencing epoch."""
        return self.work.attempt_id

    @property
    def rollout_id(self) -> str:
        """The rollout."""
        return self.work.rollout.rollout_id

    def stop_because(self, reason: StopReason) -> bool:
        """Tells the agent to stop; False when it already was told."""
        if self.stop.done():
            return False
        self.stop.set_result(reason)
        return True


class HeldTable:
    """All leases of one worker, by attempt."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def get(self, attempt_id: str) -> Held | None:
        """The lease of this attempt; None when it is not held."""
        return self._held.get(attempt_id)

    def add(self, work: LeasedRollout, sent: float) -> Held:
        """Takes a delivery; its lease counts from `sent` (monotonic clock)."""
        held = Held(work, sent + work.lease.duration)
        self._held[held.attempt_id] = held
        self._empty.clear()
        return held

    def settle(self, attempt_id: str) -> None:
        """Forgets a lease: the store has taken the attempt's end, or it is ours no longer."""
        self._held.pop(attempt_id, None)
        if not self._held:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Returns when nothing is held."""
        await self._empty.wait()

    def leases(self) -> list[Lease]:
        """All leases, for a renewal or a reopened stream."""
        return [held.work.lease for held in self._held.values()]

    def running(self) -> int:
        """How many agents are at work."""
        return sum(not held.finished for held in self._held.values())

    def newly_overdue(self) -> list[Held]:
        """Leases that have passed their expiry unrenewed since the last call: the store is away."""
        now = time.monotonic()
        found = [held for held in self._held.values() if held.expires < now and not held.overdue]
        for held in found:
            held.overdue = True
        return found
