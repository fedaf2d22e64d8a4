"""Wakes watchers and waiters of this process after a commit. A wake-up is a hint: they read the log again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from agl_grpc.store.storage.events import EventRow


class Waiter:
    """Somebody who wants to know that something of interest may have changed."""

    __slots__ = ("_future", "_seen", "_woken", "entities", "refs", "run_keys")

    def __init__(
        self, entities: frozenset[int], run_keys: frozenset[int] | None, refs: frozenset[int] | None
    ) -> None:
        self.entities = entities
        self.run_keys = run_keys
        self.refs = refs
        self._woken = False
        self._future: asyncio.Future[None] | None = None
        self._seen: set[int] = set()

    def wants(self, event: EventRow) -> bool:
        """Whether the event is of interest."""
        return (
            event.entity in self.entities
            and (self.run_keys is None or event.run_key in self.run_keys)
            and (self.refs is None or event.ref in self.refs)
        )

    def wake(self) -> None:
        """Lets `wait` return."""
        self._woken = True
        self._return()

    def note(self, ref: int) -> None:
        """Lets `wait` return because of this entity."""
        self._seen.add(ref)
        self.wake()

    def take(self) -> set[int]:
        """The entities that woke it since the last call; for waiters with `refs` only."""
        seen, self._seen = self._seen, set()
        return seen

    async def wait(self, seconds: float | None) -> bool:
        """Waits for a wake-up since the last call; False = the time is over.

        Args:
            seconds: Longest wait; None = for ever.
        """
        # A thousand watchers may wait and be woken at once: no task each, as `asyncio.wait_for` would make.
        if not self._woken:
            loop = asyncio.get_running_loop()
            self._future = loop.create_future()
            timer = None if seconds is None else loop.call_later(seconds, self._return)
            try:
                await self._future
            finally:
                self._future = None
                if timer is not None:
                    timer.cancel()
        woken, self._woken = self._woken, False
        return woken

    def _return(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class Hub:
    """All waiters of the process; used on the event loop only."""

    def __init__(self) -> None:
        self._broad: set[Waiter] = set()
        self._by_ref: dict[tuple[int, int], set[Waiter]] = {}
        self._closed = False
        self.generation = 0
        """Grows with every change that is published."""

    def add(
        self,
        entities: Iterable[int],
        *,
        run_keys: Iterable[int] | None = None,
        refs: Iterable[int] | None = None,
    ) -> Waiter:
        """A new waiter.

        Args:
            entities: EntityKinds of interest.
            run_keys: Only of these runs; None = all.
            refs: Only of these entities; None = all.
        """
        waiter = Waiter(
            frozenset(entities),
            None if run_keys is None else frozenset(run_keys),
            None if refs is None else frozenset(refs),
        )
        if waiter.refs is None:
            self._broad.add(waiter)
        else:
            for entity in waiter.entities:
                for ref in waiter.refs:
                    self._by_ref.setdefault((entity, ref), set()).add(waiter)
        if self._closed:
            waiter.wake()
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Forgets a waiter."""
        if waiter.refs is None:
            self._broad.discard(waiter)
            return
        for entity in waiter.entities:
            for ref in waiter.refs:
                waiters = self._by_ref.get((entity, ref))
                if waiters is not None:
                    waiters.discard(waiter)
                    if not waiters:
                        del self._by_ref[entity, ref]

    def publish(self, events: Sequence[EventRow]) -> None:
        """Wakes whoever is concerned."""
        self.generation += 1
        for event in events:
            for waiter in self._by_ref.get((event.entity, event.ref), ()):
                waiter.note(event.ref)
            for waiter in self._broad:
                if waiter.wants(event):
                    waiter.wake()

    @property
    def closed(self) -> bool:
        """Whether the server drains: waits and watches end."""
        return self._closed

    def close(self) -> None:
        """Wakes everybody for the last time."""
        self._closed = True
        waiters = set(self._broad)
        for some in self._by_ref.values():
            waiters |= some
        for waiter in waiters:
            waiter.wake()
