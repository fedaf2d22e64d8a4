"""Calls that have to reach the store, however long it is away."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from agl_grpc.client import Overloaded, StoreUnavailable

T = TypeVar("T")

log = logging.getLogger(__name__)

TRANSIENT = (StoreUnavailable, Overloaded)
"""Errors that pass by themselves: the store is away, restarts, or has too much to do."""


def pauses(first: float = 0.1, longest: float = 2.0) -> Iterator[float]:
    """Endless waits in seconds, doubling from `first` to `longest`, each cut by up to a half at random."""
    pause = first
    while True:
        # Chance spreads the workers of a cluster over time; it keeps no secret.
        yield pause * random.uniform(0.5, 1.0)
        pause = min(longest, pause * 2)


async def until_answered(call: Callable[[], Awaitable[T]], what: str) -> T:
    """Repeats `call` until the store answers; says once that `what` waits, and once that it has gone through.

    Raises:
        StoreError: the store refused the call for good.
    """
    waiting = False
    for pause in pauses():
        try:
            answer = await call()
        except TRANSIENT as error:
            if not waiting:
                log.warning("%s; kept until it is back: %s", error, what)
            waiting = True
        else:
            if waiting:
                log.info("the store is back; delivered: %s", what)
            return answer
        await asyncio.sleep(pause)
    raise AssertionError("pauses never end")
