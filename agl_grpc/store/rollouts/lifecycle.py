"""The life of rollouts and attempts (R3-R7, R9-R11): every state by every event. Pure, no I/O.

Two tables say what an event does to a state; `judge` says which rollout event the end of an attempt
is; `seal` says when an attempt is sealed. Both back ends apply what these functions decide.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from agl_grpc.v1 import attempt_pb2, rollout_pb2

QUEUING = int(rollout_pb2.ROLLOUT_STATUS_QUEUING)
PREPARING = int(rollout_pb2.ROLLOUT_STATUS_PREPARING)
RUNNING = int(rollout_pb2.ROLLOUT_STATUS_RUNNING)
SUCCEEDED = int(rollout_pb2.ROLLOUT_STATUS_SUCCEEDED)
FAILED = int(rollout_pb2.ROLLOUT_STATUS_FAILED)
CANCELLED = int(rollout_pb2.ROLLOUT_STATUS_CANCELLED)
REQUEUING = int(rollout_pb2.ROLLOUT_STATUS_REQUEUING)

ROLLOUT_STATES = (QUEUING, PREPARING, RUNNING, SUCCEEDED, FAILED, CANCELLED, REQUEUING)
ROLLOUT_TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
ROLLOUT_WAITING = frozenset({QUEUING, REQUEUING})

A_PREPARING = int(attempt_pb2.ATTEMPT_STATUS_PREPARING)
A_RUNNING = int(attempt_pb2.ATTEMPT_STATUS_RUNNING)
A_SUCCEEDED = int(attempt_pb2.ATTEMPT_STATUS_SUCCEEDED)
A_FAILED = int(attempt_pb2.ATTEMPT_STATUS_FAILED)
A_TIMEOUT = int(attempt_pb2.ATTEMPT_STATUS_TIMEOUT)
A_UNRESPONSIVE = int(attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE)
A_CANCELLED = int(attempt_pb2.ATTEMPT_STATUS_CANCELLED)

ATTEMPT_STATES = (A_PREPARING, A_RUNNING, A_SUCCEEDED, A_FAILED, A_TIMEOUT, A_UNRESPONSIVE, A_CANCELLED)
ATTEMPT_LIVE = frozenset({A_PREPARING, A_RUNNING})
RETRYABLE = frozenset({A_FAILED, A_TIMEOUT, A_UNRESPONSIVE})

KIND_INFRASTRUCTURE = int(attempt_pb2.FAILURE_KIND_INFRASTRUCTURE)
KIND_AGENT = int(attempt_pb2.FAILURE_KIND_AGENT)
KIND_TRUNCATED = int(attempt_pb2.FAILURE_KIND_TRUNCATED)
KIND_CANCELLED = int(attempt_pb2.FAILURE_KIND_CANCELLED)

LARGEST_BACKOFF = 60_000_000
"""Longest wait before a retry, in microseconds."""

RECONNECT_GRACE = 10_000_000
"""So long after the store was away nothing is sealed, in microseconds. Model calls go on while it is away,
and whoever recorded them may come back later than the worker that ends their attempt: an interceptor tries
each 2 s, a second time if its connection was not ready, and then has some time to deliver what it holds."""


class AttemptEvent(enum.Enum):
    """What can happen to an attempt."""

    SIGNAL = "a span or another sign that the agent is at work"
    SUCCEED = "its worker says that it ended well"
    FAIL = "its worker says that it failed"
    TIME_OUT = "it took longer than its timeout"
    FALL_SILENT = "no sign of life for too long"
    LOSE_LEASE = "its lease was not renewed in time"
    RELEASE = "its worker hands it back unfinished"
    CANCEL = "its rollout was cancelled"


class RolloutEvent(enum.Enum):
    """What can happen to a rollout."""

    DELIVER = "a new attempt was made"
    SIGNAL = "its newest attempt is at work"
    SUCCEED = "its newest attempt ended well"
    RETRY = "its newest attempt ended and another is due"
    FAIL = "its newest attempt ended and no other is due"
    CANCEL = "its owner takes it back, or it waited too long"


class Outcome(enum.Enum):
    """What an event does."""

    CHANGED = "the state changes"
    KEPT = "nothing happens, and that is all right"
    REFUSED = "the event is not allowed in this state"


@dataclass(frozen=True, slots=True)
class Move:
    """The effect of an event: its outcome and the state afterwards."""

    outcome: Outcome
    status: int


_ATTEMPT_RESULT = {
    AttemptEvent.SIGNAL: A_RUNNING,
    AttemptEvent.SUCCEED: A_SUCCEEDED,
    AttemptEvent.FAIL: A_FAILED,
    AttemptEvent.TIME_OUT: A_TIMEOUT,
    AttemptEvent.FALL_SILENT: A_UNRESPONSIVE,
    AttemptEvent.LOSE_LEASE: A_UNRESPONSIVE,
    AttemptEvent.RELEASE: A_CANCELLED,
    AttemptEvent.CANCEL: A_CANCELLED,
}
# What a worker or a caller says of an attempt that is over is refused; what happens by itself is not news.
_REFUSED_WHEN_OVER = frozenset({AttemptEvent.SUCCEED, AttemptEvent.FAIL, AttemptEvent.RELEASE})
_REVIVING = frozenset({AttemptEvent.SIGNAL, AttemptEvent.SUCCEED, AttemptEvent.FAIL, AttemptEvent.RELEASE})

_ROLLOUT_RESULT = {
    RolloutEvent.DELIVER: PREPARING,
    RolloutEvent.SIGNAL: RUNNING,
    RolloutEvent.SUCCEED: SUCCEEDED,
    RolloutEvent.RETRY: REQUEUING,
    RolloutEvent.FAIL: FAILED,
    RolloutEvent.CANCEL: CANCELLED,
}


def is_revivable(status: int, *, leased: bool, newest: bool, rollout_status: int) -> bool:
    """Whether a silent attempt may come back: it has no lease, no newer one, and its rollout is not over."""
    return status == A_UNRESPONSIVE and not leased and newest and rollout_status not in ROLLOUT_TERMINAL


def is_over(status: int, *, revivable: bool) -> bool:
    """Whether nothing can change the attempt's status any more."""
    return status not in ATTEMPT_LIVE and not revivable


def move_attempt(status: int, event: AttemptEvent, *, revivable: bool = False) -> Move:
    """What an event does to an attempt.

    Args:
        status: Where it stands.
        event: What happened.
        revivable: As `is_revivable` says.
    """
    result = _ATTEMPT_RESULT[event]
    if status in ATTEMPT_LIVE:
        return Move(Outcome.KEPT if result == status else Outcome.CHANGED, result)
    if revivable and event in _REVIVING:
        return Move(Outcome.CHANGED, result)
    if revivable and event is AttemptEvent.CANCEL:
        return Move(Outcome.CHANGED, A_CANCELLED)
    if event in _REFUSED_WHEN_OVER and result != status:
        return Move(Outcome.REFUSED, status)
    return Move(Outcome.KEPT, status)


def move_rollout(status: int, event: RolloutEvent) -> Move:
    """What an event does to a rollout. Terminal is terminal (R4)."""
    if status in ROLLOUT_TERMINAL:
        return Move(Outcome.REFUSED if event is RolloutEvent.DELIVER else Outcome.KEPT, status)
    result = _ROLLOUT_RESULT[event]
    return Move(Outcome.KEPT if result == status else Outcome.CHANGED, result)


def assign_rollout(status: int, wanted: int) -> Move:
    """What it does to a rollout when a caller sets its status by hand."""
    if wanted == status:
        return Move(Outcome.KEPT, status)
    if status in ROLLOUT_TERMINAL:
        return Move(Outcome.REFUSED, status)
    return Move(Outcome.CHANGED, wanted)


def assign_attempt(wanted: int) -> AttemptEvent | None:
    """The event that a caller means who sets an attempt's status by hand; None = no such event."""
    return {
        A_RUNNING: AttemptEvent.SIGNAL,
        A_SUCCEEDED: AttemptEvent.SUCCEED,
        A_FAILED: AttemptEvent.FAIL,
        A_TIMEOUT: AttemptEvent.TIME_OUT,
        A_UNRESPONSIVE: AttemptEvent.FALL_SILENT,
        A_CANCELLED: AttemptEvent.RELEASE,
    }.get(wanted)


@dataclass(frozen=True, slots=True)
class Rules:
    """A rollout's rules and how much of them is used up (R6). `backoff` is in microseconds."""

    max_attempts: int
    retry_mask: int
    max_redeliveries: int
    backoff: int
    ended_attempts: int
    redeliveries: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the end of the newest attempt means for its rollout.

    Attributes:
        event: The rollout's event.
        ended_attempts: The new count of attempts that ended by themselves.
        redeliveries: The new count of redeliveries after infrastructure failures.
        delay: Microseconds before the next delivery.
    """

    event: RolloutEvent
    ended_attempts: int
    redeliveries: int
    delay: int = 0


def judge(rules: Rules, event: AttemptEvent, failure_kind: int = 0) -> Verdict:
    """What the end of the newest attempt means for its rollout.

    Args:
        rules: The rollout's.
        event: How the attempt ended; not SIGNAL.
        failure_kind: Whom the worker blames; INFRASTRUCTURE is redelivered like a lost lease.
    """
    ended, again = rules.ended_attempts, rules.redeliveries
    if event is AttemptEvent.SUCCEED:
        return Verdict(RolloutEvent.SUCCEED, ended + 1, again)
    if event is AttemptEvent.CANCEL:
        return Verdict(RolloutEvent.CANCEL, ended, again)
    if event is AttemptEvent.RELEASE:
        return Verdict(RolloutEvent.RETRY, ended, again)
    blamed = event is AttemptEvent.FAIL and failure_kind == KIND_INFRASTRUCTURE
    if event is AttemptEvent.LOSE_LEASE or blamed:
        if again >= rules.max_redeliveries:
            return Verdict(RolloutEvent.FAIL, ended, again)
        # A lost lease has cost its duration already; an engine that is down needs time.
        delay = backoff(rules.backoff, again + 1) if blamed else 0
        return Verdict(RolloutEvent.RETRY, ended, again + 1, delay)
    ended += 1
    if ended < rules.max_attempts and rules.retry_mask & retry_bit(_ATTEMPT_RESULT[event]):
        return Verdict(RolloutEvent.RETRY, ended, again, backoff(rules.backoff, ended))
    return Verdict(RolloutEvent.FAIL, ended, again)


def default_kind(event: AttemptEvent) -> int:
    """The failure kind of an attempt whose worker names none (R7); 0 = no failure."""
    return {
        AttemptEvent.FAIL: KIND_AGENT,
        AttemptEvent.TIME_OUT: KIND_TRUNCATED,
        AttemptEvent.FALL_SILENT: KIND_INFRASTRUCTURE,
        AttemptEvent.LOSE_LEASE: KIND_INFRASTRUCTURE,
        AttemptEvent.RELEASE: KIND_CANCELLED,
        AttemptEvent.CANCEL: KIND_CANCELLED,
    }.get(event, 0)


def retry_bit(status: int) -> int:
    """The bit of `retry_mask` that stands for an attempt's end."""
    return 1 << status


def backoff(first: int, count: int) -> int:
    """Microseconds before the count-th retry: doubling from `first`, at most 60 s."""
    return min(first << min(count - 1, 40), LARGEST_BACKOFF)


@dataclass(frozen=True, slots=True)
class Seal:
    """Whether an attempt is sealed now.

    Attributes:
        now: It is.
        incomplete: It is, without calls that were still open.
        due: When it is sealed at the latest, if it is not yet; None = not over yet.
        look: When this must be decided anew, if nothing happens before.
    """

    now: bool
    incomplete: bool = False
    due: int | None = None
    look: int | None = None


def is_grace(now: int, returned: int) -> bool:
    """Whether the store was away so lately that producers may not be back yet; `seal` says the rest."""
    return now < returned + RECONNECT_GRACE


def seal(
    *, over: bool, open_calls: int, now: int, seal_due: int | None, seal_timeout: int, returned: int
) -> Seal:
    """R11: sealed when over with no open call, or when the seal timeout has passed.

    Neither before the grace after the store's return is over, which is never longer than the seal timeout:
    until then there may be calls that nobody could announce.

    Args:
        over: Whether the attempt is over.
        open_calls: Model calls announced and not closed.
        now: Microseconds since the epoch.
        seal_due: When the timeout passes; None = it starts now.
        seal_timeout: Microseconds.
        returned: When the store last came back, in microseconds since the epoch; 0 = it never was away.
    """
    if not over:
        return Seal(False)
    held = returned + min(RECONNECT_GRACE, seal_timeout)
    due = now + seal_timeout if seal_due is None else seal_due
    if open_calls > 0:
        due = look = max(due, held)
    else:
        look = min(due, held)  # also when the store is away again and again
    if now >= look:
        return Seal(True, incomplete=open_calls > 0)
    return Seal(False, due=due, look=look)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What runs on an attempt; all in microseconds, None = does not run.

    Attributes:
        start_time: Its delivery.
        last_heartbeat: Last sign of life.
        timeout: Longest duration.
        unresponsive: Longest silence.
        lease_expire: When its lease ends.
        seal_due: When it is sealed at the latest.
    """

    start_time: int
    last_heartbeat: int | None
    timeout: int | None
    unresponsive: int | None
    lease_expire: int | None
    seal_due: int | None


def next_due(live: bool, clocks: Clocks) -> int | None:
    """The earliest moment at which something may happen to an attempt by itself."""
    if not live:
        return clocks.seal_due
    moments = []
    if clocks.timeout is not None:
        moments.append(clocks.start_time + clocks.timeout)
    if clocks.unresponsive is not None:
        moments.append(max(clocks.start_time, clocks.last_heartbeat or 0) + clocks.unresponsive)
    if clocks.lease_expire is not None:
        moments.append(clocks.lease_expire)
    return min(moments, default=None)


def fire(live: bool, clocks: Clocks, now: int) -> AttemptEvent | None:
    """What has happened to a live attempt by itself by now; None = nothing yet.

    The timeout comes first: it is the caller's rule and uses up an attempt. A silent attempt with a lease
    whose lease has run out as well has lost its lease.
    """
    if not live:
        return None
    if clocks.timeout is not None and now >= clocks.start_time + clocks.timeout:
        return AttemptEvent.TIME_OUT
    if clocks.lease_expire is not None and now >= clocks.lease_expire:
        return AttemptEvent.LOSE_LEASE
    if clocks.unresponsive is not None:
        heard = max(clocks.start_time, clocks.last_heartbeat or 0)
        if now >= heard + clocks.unresponsive:
            return AttemptEvent.FALL_SILENT
    return None
