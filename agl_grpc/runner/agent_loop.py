"""The event loop of the agents, in a thread of its own: an agent that blocks it delays no lease renewal."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import selectors
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class _OwnProcess(selectors.DefaultSelector):
    """Ends a forked child that comes back to the loop: it must not run the other agents a second time."""

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if os.getpid() != self._process:
            os._exit(1)
        return super().select(timeout)


class _Loop(asyncio.SelectorEventLoop):
    """Starts programs also under the policy of uvloop, whose own loops watch them by other means."""

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> Any:
        """As the standard library's."""
        _let_children_be_watched()
        return await super().subprocess_shell(*args, **kwargs)

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        """As the standard library's."""
        _let_children_be_watched()
        return await super().subprocess_exec(*args, **kwargs)


def _let_children_be_watched() -> None:
    # Until Python 3.14 the standard library's loops ask the policy for what tells them that a program ended.
    if sys.version_info >= (3, 14):
        return
    policy = asyncio.get_event_loop_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            policy.get_child_watcher()
        except NotImplementedError:
            watcher = asyncio.ThreadedChildWatcher()
            setattr(policy, "get_child_watcher", lambda: watcher)  # noqa: B010  # a method of this object alone


class AgentLoop:
    """Runs coroutines on a loop of its own.

    The loop is the standard library's: with it agents can start subprocesses from any thread, and it is what
    their libraries are tested with.
    """

    def __init__(self) -> None:
        self._loop = _Loop(_OwnProcess())
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="agents", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._closing:
                self._run()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        # An agent's own task that calls sys.exit() breaks out of the loop; the other agents go on.
        except (SystemExit, KeyboardInterrupt) as error:
            log.warning("a task of an agent raised %s; the agents' loop goes on", type(error).__name__)

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs `work()` on the agents' loop, with the caller's context variables, and returns its result.

        Cancelling the caller cancels the work; the caller then still waits for its end.
        """
        caller = asyncio.get_running_loop()
        ended: asyncio.Future[asyncio.Task[T]] = caller.create_future()
        context = contextvars.copy_context()
        started: list[asyncio.Task[T]] = []

        def settle(task: asyncio.Task[T]) -> None:
            if not ended.done():
                ended.set_result(task)

        def tell(task: asyncio.Task[T]) -> None:
            # Work that was left behind may end after the caller's loop: nobody waits for it then.
            if not caller.is_closed():
                caller.call_soon_threadsafe(settle, task)

        def begin() -> None:
            task = self._loop.create_task(work(), context=context)
            started.append(task)
            task.add_done_callback(tell)

        self._loop.call_soon_threadsafe(begin)
        try:
            task = await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(lambda: started[0].cancel())
            await ended
            raise
        return task.result()

    def close(self) -> None:
        """Stops the loop; work that would not end is left as it is."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
