"""How a learner is asked to end: by a signal, or through the store while it waits for other learners."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agl_grpc.learner.errors import StoppedError
from agl_grpc.learner.training_run import TrainingRun

if TYPE_CHECKING:
    from agl_grpc.learner.publication import Publisher
    from agl_grpc.learner.verl.manager import RolloutManager


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


async def heed_stop(training: TrainingRun, manager: RolloutManager, publisher: Publisher) -> None:
    """Ends the waits for the run's other learners when this one is asked to stop: they may never come."""
    try:
        await training.asked_to_stop()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        manager.deliver(error)
    if training.stop_requested:
        publisher.release()
        manager.deliver(StoppedError("the training run was asked to stop"))
