"""How a learner is asked to end: by a signal, or through the store while it waits for other learners."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from agl_grpc.learner.errors import StoppedError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TrainingRun

if TYPE_CHECKING:
    from agl_grpc.learner.verl.manager import RolloutManager

T = TypeVar("T")


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends training at once, as Ctrl-C does; what was not committed is trained again on resume."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stopped = False

    def stop(_number: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True
        # Ray's waits end for this exception only, and swallow any other that a signal handler raises.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if stopped:
            raise StoppedError("stopped by SIGTERM") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class Waits:
    """Waits for the run's other learners; they end when this one is asked to stop, as the others may never
    come.
    """

    def __init__(self, link: StoreLink) -> None:
        self._link = link
        self._pending: Future[Any] | None = None
        self._released = False

    def until(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What ``work`` answers; None once `release` was called."""
        pending = self._link.start(work)
        self._pending = pending
        if self._released:
            pending.cancel()
        try:
            return pending.result()
        except CancelledError:
            return None
        except BaseException:
            pending.cancel()
            raise

    @property
    def released(self) -> bool:
        """Whether this training run was asked to end: what would have been waited for may not be there."""
        return self._released

    def release(self) -> None:
        """Ends the wait, now and from now on: this training run ends. From any thread."""
        self._released = True
        if self._pending is not None:
            self._pending.cancel()


async def heed_stop(training: TrainingRun, manager: RolloutManager, waits: Waits) -> None:
    """Ends the waits for the run's other learners when this one is asked to stop: they may never come."""
    try:
        await training.asked_to_stop()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        manager.deliver(error)
    if training.stop_requested:
        waits.release()
        manager.deliver(StoppedError("the training run was asked to stop"))
