"""The one thread of a process whose event loop owns every object of gRPC that sync code uses."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_STOP_SECONDS = 5.0
_lock = threading.Lock()
_current: IoThread | None = None


class ForkedProcess(RuntimeError):
    """An object of another process was used after a fork, where gRPC does not work."""


class IoThread:
    """A thread with an event loop; see `io_thread` for the process's own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._main, name="agl-grpc-io", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The thread's event loop."""
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the thread's loop.

        Raises `ForkedProcess` in a child made by fork: workers start by spawn or forkserver.
        """
        if self._pid != os.getpid():
            coroutine.close()
            raise ForkedProcess(
                "a client of the parent process was used after fork; make clients in the child, "
                "and start processes with multiprocessing's spawn or forkserver"
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and wait for it, at most ``timeout`` seconds (``None`` = for ever).

        Raises `RuntimeError` on the loop's own thread, which must never wait for itself.
        """
        if threading.get_ident() == self._thread.ident:
            coroutine.close()
            raise RuntimeError("a blocking call on the I/O thread would wait for itself; await instead")
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()  # Ctrl-C or a time-out: what nobody waits for does not go on
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the thread's loop and await it from another loop."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(RuntimeError):  # the loop may have been stopped a second time
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _stop(self) -> None:
        if self._pid == os.getpid() and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_SECONDS)


def io_thread() -> IoThread:
    """The process's I/O thread, started at its first use; a process made by fork gets a new one."""
    global _current
    with _lock:
        if _current is None or _current._pid != os.getpid():
            _current = IoThread()
        return _current


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
