"""Synchronous agents: each call in a thread of its own, so that none can block the worker's event loop."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_numbers = itertools.count(1)


class AgentStopped(BaseException):
    """Raised inside a synchronous agent whose attempt was cancelled, timed out or lost."""


class AbandonedThreads:
    """Counts threads that were told to stop and have not: they hold memory until the process ends."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def add(self, thread: threading.Thread) -> None:
        """Remembers a thread that its caller no longer waits for."""
        self._threads.add(thread)

    def count(self) -> int:
        """How many of them still run."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        return len(self._threads)


async def run_in_thread(call: Callable[[], T], abandoned: AbandonedThreads) -> T:
    """Runs `call` in a new daemon thread with the caller's context variables and returns its result.

    When the awaiting task is cancelled the thread is told to stop: `AgentStopped` is raised in it at
    its next Python instruction. A thread that hangs inside C code cannot be stopped; it is left
    behind and counted in `abandoned`.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def body() -> None:
        try:
            result = context.run(call)
        except BaseException as error:
            # StopIteration cannot cross a future; it is as much a defect of the agent as any other.
            crossing = (
                RuntimeError("the agent raised StopIteration") if type(error) is StopIteration else error
            )
            _post(loop, settle, future.set_exception, crossing)
        else:
            _post(loop, settle, future.set_result, result)

    thread = threading.Thread(target=body, name=f"agent-{next(_numbers)}", daemon=True)
    thread.start()
    try:
        return await future
    except asyncio.CancelledError:
        if thread.is_alive():
            _raise_in(thread)
            abandoned.add(thread)
        raise


def _post(loop: asyncio.AbstractEventLoop, *call: Any) -> None:
    # A thread that was left behind may end after its loop: nobody waits for it then.
    if not loop.is_closed():
        loop.call_soon_threadsafe(*call)


def _raise_in(thread: threading.Thread) -> None:
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(AgentStopped)
        )
