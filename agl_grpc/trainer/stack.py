"""The processes of a training run: started, watched, and all of them ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agl_grpc.runner.exits import describe_exit
from agl_grpc.trainer.errors import PartDied
from agl_grpc.trainer.guard import Guard
from agl_grpc.trainer.processes import Part
from agl_grpc.trainer.sweep import sweep

T = TypeVar("T")
log = logging.getLogger(__name__)

# In this order: the store last, because the others still write to it while they end. Of several of a kind,
# each is named KIND-NAME.
_STOP_ORDER = (("learner", "runner"), ("engine",), ("store",))
_HEALTHY_SECONDS = 10.0
_RESTARTS_IN_A_ROW = 5
_FIRST_PAUSE = 0.1


class Stack:
    """Starts parts and notices when one ends that should not. Use it within one event loop, then `close` it.

    Args:
        say: told each thing worth a line.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, say: Callable[[str], None], grace: float = 20.0) -> None:
        self.mark = uuid.uuid4().hex
        self._say = say
        self._grace = grace
        self._parts: dict[str, Part] = {}
        self._remake: dict[str, Callable[[], Part]] = {}
        self._ready: set[str] = set()
        self._may_end: set[str] = set()
        self._failures: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._guard: Guard | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fatal: asyncio.Future[None] | None = None
        self._ended: dict[str, asyncio.Event] = {}
        self.restarts = 0

    def bind(self) -> None:
        """Names the event loop that is told of deaths: the running one."""
        self._loop = asyncio.get_running_loop()
        self._fatal = self._loop.create_future()

    def start(self, make: Callable[[], Part], *, restart: bool = False, may_end: bool = False) -> Part:
        """Starts a part.

        Args:
            make: makes it, also for each restart.
            restart: start it anew whenever it dies after it was ready once.
            may_end: exit code 0 is a good end, not a death.
        """
        part = make()
        if restart:
            self._remake[part.name] = make
        if may_end:
            self._may_end.add(part.name)
        self._ended.setdefault(part.name, asyncio.Event())
        with self._lock:
            self._guard = self._guard or Guard(self.mark)
            self._parts[part.name] = part
            part.start(self._on_exit)
        return part

    def ready(self, name: str) -> None:
        """The part has answered: from now on its death is an accident, not a failed start."""
        self._ready.add(name)

    def part(self, name: str) -> Part:
        """A part that was started."""
        return self._parts[name]

    def has(self, name: str) -> bool:
        """Whether the part was started."""
        return name in self._parts

    async def until(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``; PartDied as soon as a part dies that is needed."""
        assert self._fatal is not None, "bind comes first"
        task = asyncio.ensure_future(work)
        try:
            waited: set[asyncio.Future[Any]] = {task, self._fatal}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._fatal.done():
                if task.done() and not task.cancelled():
                    task.exception()  # What came of it counts no more, and is no error that nobody saw.
                self._fatal.result()
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def fail(self, error: Exception) -> None:
        """Has `until` raise an error; from any thread."""

        def on_loop() -> None:
            if self._fatal is not None and not self._fatal.done():
                self._fatal.set_exception(error)
                self._fatal.exception()  # Whoever waits sees it; if nobody does, that is no defect.

        assert self._loop is not None, "bind comes first"
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(on_loop)

    async def ended(self, name: str) -> int:
        """Waits for a part's end; its exit code."""
        await self._ended[name].wait()
        code = self._parts[name].code
        assert code is not None
        return code

    def _on_exit(self, part: Part) -> None:
        """Called from the part's watching thread."""
        with self._lock:
            if self._closing.is_set() or part.stopping or self._parts.get(part.name) is not part:
                return
        if part.name in self._remake and part.name in self._ready:
            self._restart(part)
        else:
            self._tell(part, expected=part.code == 0 and part.name in self._may_end)

    def _restart(self, part: Part) -> None:
        lived = time.monotonic() - part.started
        failures = 0 if lived >= _HEALTHY_SECONDS else self._failures.get(part.name, 0) + 1
        self._failures[part.name] = failures
        if failures > _RESTARTS_IN_A_ROW:
            self._tell(part, expected=False)
            return
        self._say(f"{part.name} {describe_exit(part.code)}; starting it again")
        if self._closing.wait(_FIRST_PAUSE * 2.0 ** max(0, failures - 1)):
            return
        with self._lock:
            if self._closing.is_set():
                return
            fresh = self._remake[part.name]()
            self._parts[part.name] = fresh
            self.restarts += 1
            fresh.start(self._on_exit)

    def _tell(self, part: Part, *, expected: bool) -> None:
        def on_loop() -> None:
            self._ended[part.name].set()
            if not expected and self._fatal is not None and not self._fatal.done():
                self._fatal.set_exception(PartDied(part.obituary()))
                self._fatal.exception()  # Whoever waits sees it; if nobody does, that is no defect.

        assert self._loop is not None, "bind comes first"
        try:
            self._loop.call_soon_threadsafe(on_loop)
        except RuntimeError:
            log.debug("%s ended after the event loop", part.name)

    def close(self) -> int:
        """Ends everything: SIGTERM, grace, SIGKILL, and whatever descendants are left. Answers their number.

        A Ctrl-C while it waits ends everything at once.
        """
        self._closing.set()
        try:
            with self._lock:
                parts = dict(self._parts)
            for kinds in _STOP_ORDER:
                self._stop([part for name, part in parts.items() if name.partition("-")[0] in kinds])
        finally:
            for part in self._parts.values():
                part.kill()
            left = sweep(self.mark)
            for part in self._parts.values():
                part.wait(self._grace)
            if self._guard is not None:
                self._guard.dismiss()
        return left

    def _stop(self, parts: list[Part]) -> None:
        running = [part for part in parts if part.code is None]
        for part in running:
            part.terminate()
        deadline = time.monotonic() + self._grace
        for part in running:
            if not part.wait(max(0.0, deadline - time.monotonic())):
                self._say(f"{part.name} did not end within {self._grace:g} s and is killed")
                part.kill()
                part.wait(self._grace)
