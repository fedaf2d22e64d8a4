"""Phases of a step: each has a deadline, and what goes wrong in verl's workers is one line.

verl waits for its workers for ever, and an error of theirs is a page of Ray's. A phase that takes too long is
ended here with the names of those that do not answer; a worker's error becomes one of ours.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from agl_grpc.learner.errors import DeadlineError, LearnerError, MemoryExhaustedError, WorkerError

R = TypeVar("R")

# Seconds in which an idle worker answers, also on a busy machine.
_ANSWER_SECONDS = 5.0
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu")
_MEMORY_ADVICE = (
    "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (or ppo_micro_batch_size_per_gpu), or train on "
    "more GPUs"
)


def silent_workers(groups: Mapping[str, Any]) -> list[str]:
    """Names of the workers that do not answer, such as ``actor rank 1``.

    Args:
        groups: verl's worker groups by role. Colocated roles share their workers.
    """
    import ray

    names: dict[Any, str] = {}
    for role, group in groups.items():
        for rank, worker in enumerate(group.workers):
            names.setdefault(worker, f"{role} rank {rank}")
    # A method like any other, so that it waits behind the one that hangs; what it answers is of no account.
    asked = {worker.get_cuda_visible_devices.remote(): name for worker, name in names.items()}
    _, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    return [asked[each] for each in waiting]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def translated(doing: str, error: Exception) -> LearnerError | None:
    """An error of a verl worker as one of ours, in one line; None when it is no worker's."""
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        line = f"{type(cause).__name__}: {_first_line(cause)}"
        if isinstance(cause, LearnerError):
            return cause
        if any(sign in str(cause).lower() for sign in _OUT_OF_MEMORY) or isinstance(cause, MemoryError):
            return MemoryExhaustedError(f"out of memory while {doing}: {line}; {_MEMORY_ADVICE}")
        return WorkerError(f"a worker of verl failed while {doing}: {line}")
    if isinstance(error, RayActorError | OutOfMemoryError):
        return WorkerError(
            f"a worker of verl died while {doing} ({_first_line(error)}); if the system took its memory "
            f"away: {_MEMORY_ADVICE}"
        )
    return None


@contextmanager
def _bounded(doing: str, seconds: float, key: str, groups: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Raises DeadlineError in the main thread once ``seconds`` have passed."""
    expired = over = False

    def interrupt(_number: int, _frame: Any) -> None:
        nonlocal expired
        # Ray's waits end for this exception only, and swallow any other that a signal handler raises.
        if not over:
            expired = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    # The system's timer, of which there is one: a phase within a phase has it for the time that it takes.
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    except KeyboardInterrupt:
        if expired:
            raise DeadlineError(_overdue(doing, seconds, key, groups())) from None
        raise
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3))


def _overdue(doing: str, seconds: float, key: str, groups: Mapping[str, Any]) -> str:
    """What is said of a phase that took too long, with the workers that do not answer."""
    silent = silent_workers(groups) if groups else ["verl's workers, which are being started"]
    state = f"no answer from {', '.join(silent)}" if silent else "every worker of verl answers"
    return f"{doing} took longer than {seconds:g} s (deadlines.{key}); {state}"


def phase(doing: str, key: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Makes a method of the trainer a phase.

    The trainer answers ``deadline_of(key)`` (seconds) and ``worker_groups()``. Only the main thread can be
    interrupted: elsewhere errors are translated, and nothing is bounded.

    Args:
        doing: what the phase does, as in "updating the actor".
        key: its deadline's name in the configuration.
    """

    def decorate(method: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(method)
        def watched(self: Any, *args: Any, **kwargs: Any) -> R:
            try:
                if threading.current_thread() is not threading.main_thread():
                    return method(self, *args, **kwargs)
                with _bounded(doing, self.deadline_of(key), key, self.worker_groups):
                    return method(self, *args, **kwargs)
            except Exception as error:
                ours = translated(doing, error)
                if ours is None:
                    raise
                raise ours from error

        return watched

    return decorate
