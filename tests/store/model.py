"""A small model of the store's promises (R3-R7, R9-R11), written apart from the store's own rules.

Names of states are the contract's in lower case; times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LIVE = ("preparing", "running")
OVER = ("succeeded", "failed", "cancelled")
SEAL_TIMEOUT = 60
GRACE = 10


class Refused(Exception):
    """The store must refuse this."""


# By identity: attempts and rollouts refer to each other.
@dataclass(eq=False)
class Attempt:
    """One try."""

    rollout: Rollout
    leased: bool
    start: float
    duration: float = 0
    status: str = "preparing"
    heard: float = 0
    expire: float = 0
    calls: int = 0
    sealed: bool = False
    seal_at: float | None = None
    incomplete: bool = False
    lost: bool = False

    @property
    def live(self) -> bool:
        """Whether it is at work."""
        return self.status in LIVE

    @property
    def newest(self) -> bool:
        """Whether it may move its rollout."""
        return self.rollout.attempts[-1] is self

    @property
    def may_come_back(self) -> bool:
        """Whether a silent one is not over yet."""
        silent = self.status == "unresponsive" and not self.leased and self.newest
        return silent and not self.sealed and self.rollout.status not in OVER


@dataclass(eq=False)
class Rollout:
    """One unit of work."""

    max_attempts: int
    retried: bool
    max_redeliveries: int
    timeout: float | None
    silence: float | None
    priority: int = 0
    patience: float | None = None
    expire_at: float | None = None
    status: str = "queuing"
    ended: int = 0
    redelivered: int = 0
    ready_at: float = 0
    sealed: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    def is_ready(self, now: float) -> bool:
        """Whether it waits to be delivered."""
        return self.status in ("queuing", "requeuing") and self.ready_at <= now


class Model:
    """All of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.paused = False
        self.back = -float("inf")
        self.rollouts: list[Rollout] = []

    def begin(self, rollout: Rollout, duration: float | None) -> Attempt:
        """A new attempt."""
        if rollout.status in OVER:
            raise Refused
        older = rollout.attempts[-1] if rollout.attempts else None
        attempt = Attempt(rollout, duration is not None, self.now, duration or 0, heard=self.now)
        attempt.expire = self.now + attempt.duration
        rollout.attempts.append(attempt)
        rollout.status = "preparing"
        if older is not None and older.status == "unresponsive" and not older.sealed:
            self._seal(older)
        return attempt

    def ready(self) -> list[Rollout]:
        """What can be delivered, the most urgent first, then the oldest."""
        if self.paused:
            return []
        ready = [rollout for rollout in self.rollouts if rollout.is_ready(self.now)]
        return sorted(ready, key=lambda rollout: -rollout.priority)

    def signal(self, attempt: Attempt) -> None:
        """A span arrives."""
        if attempt.live or attempt.may_come_back:
            if attempt.status == "unresponsive":
                attempt.rollout.ended -= 1
            attempt.status = "running"
            attempt.heard = self.now
            if attempt.newest and attempt.rollout.status not in OVER:
                attempt.rollout.status = "running"

    def holds(self, attempt: Attempt) -> None:
        """Refuses a token that is dead."""
        if not (attempt.leased and attempt.live):
            raise Refused

    def renew(self, attempt: Attempt) -> None:
        """The lease goes on."""
        self.holds(attempt)
        attempt.expire = self.now + attempt.duration
        attempt.heard = self.now

    def end(self, attempt: Attempt, status: str, *, infrastructure: bool = False, lost: bool = False) -> None:
        """An attempt ends; the newest one moves its rollout."""
        rollout = attempt.rollout
        came_back = attempt.status == "unresponsive"
        attempt.status, attempt.lost = status, lost
        if attempt.newest and rollout.status not in OVER:
            rollout.ended -= came_back
            self._move(rollout, status, infrastructure, lost)
        if not attempt.may_come_back:
            self._seal(attempt)
        self._seal_rollout(rollout)

    def _move(self, rollout: Rollout, status: str, infrastructure: bool, lost: bool) -> None:
        wait = 0.0
        if status == "succeeded":
            rollout.status = "succeeded"
            return
        if status == "cancelled":
            rollout.status = "requeuing"
        elif lost or infrastructure:
            again = rollout.redelivered < rollout.max_redeliveries
            rollout.redelivered += again
            rollout.status = "requeuing" if again else "failed"
            wait = 0 if lost else min(60, 2 ** (rollout.redelivered - 1))
        else:
            rollout.ended += 1
            again = rollout.retried and rollout.ended < rollout.max_attempts
            rollout.status = "requeuing" if again else "failed"
            wait = min(60, 2 ** (rollout.ended - 1))
        rollout.ready_at = self.now + wait

    def _seal(self, attempt: Attempt) -> None:
        if attempt.sealed:
            return
        if attempt.seal_at is None:
            attempt.seal_at = self.now + SEAL_TIMEOUT
        self._look(attempt)

    def _look(self, attempt: Attempt) -> None:
        """Seals an attempt that is over if it is time."""
        assert attempt.seal_at is not None
        waited = self.now >= attempt.seal_at
        grace = self.now < self.back + GRACE
        if grace and waited and attempt.calls > 0:
            attempt.seal_at = self.back + GRACE
        elif waited or (attempt.calls == 0 and not grace):
            attempt.sealed, attempt.seal_at, attempt.incomplete = True, None, attempt.calls > 0
            self._seal_rollout(attempt.rollout)

    def _seal_rollout(self, rollout: Rollout) -> None:
        if rollout.status in OVER and (not rollout.attempts or rollout.attempts[-1].sealed):
            rollout.sealed = True

    def set_calls(self, attempt: Attempt, calls: int) -> None:
        """Model calls open or close."""
        if attempt.sealed:
            raise Refused
        attempt.calls = calls
        if calls == 0 and attempt.seal_at is not None:
            self._look(attempt)

    def cancel(self, rollout: Rollout) -> bool:
        """The owner takes it back."""
        if rollout.status in OVER:
            return False
        touched = [one for one in rollout.attempts if one.live or one.may_come_back]
        rollout.status = "cancelled"
        for attempt in touched:
            attempt.status = "cancelled"
            self._seal(attempt)
        self._seal_rollout(rollout)
        return True

    def reconcile(self, held: list[Attempt]) -> tuple[list[Attempt], list[Attempt]]:
        """The worker's session comes back with these leases; which it has lost, and which go back."""
        lost = [attempt for attempt in held if not (attempt.leased and attempt.live)]
        released = []
        for attempt in [one for rollout in self.rollouts for one in rollout.attempts]:
            if attempt in held and attempt not in lost:
                self.renew(attempt)
            elif attempt.leased and attempt.live:
                released.append(attempt)
        for attempt in released:
            self.end(attempt, "cancelled")
        return lost, released

    def restart(self) -> None:
        """Another server takes the store up: every live lease has its full time anew, and for a while nothing
        is sealed."""
        if any(rollout.attempts for rollout in self.rollouts):
            self.back = self.now
        for rollout in self.rollouts:
            for attempt in rollout.attempts:
                if attempt.leased and attempt.live:
                    attempt.expire = self.now + attempt.duration

    def advance(self, seconds: float) -> None:
        """Time passes, timers fire."""
        self.now += seconds
        for rollout in self.rollouts:
            for attempt in rollout.attempts:
                self._fire(attempt)
        self.expire()

    def expire(self) -> None:
        """What waited for too long is cancelled."""
        for rollout in self.rollouts:
            waits = rollout.status in ("queuing", "requeuing")
            if waits and rollout.expire_at is not None and self.now >= rollout.expire_at:
                self.cancel(rollout)

    def _fire(self, attempt: Attempt) -> None:
        rollout = attempt.rollout
        if attempt.live:
            if rollout.timeout is not None and self.now >= attempt.start + rollout.timeout:
                self.end(attempt, "timeout")
            elif attempt.leased and self.now >= attempt.expire:
                self.end(attempt, "unresponsive", lost=True)
            elif rollout.silence is not None and self.now >= attempt.heard + rollout.silence:
                self.end(attempt, "unresponsive")
        elif attempt.seal_at is not None:
            self._look(attempt)
