"""What other servers of the database did, passed on to whoever is connected to this one (R26).

Pushes are hints: leases are given in transactions of this server's own, commands are rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from agl_grpc.store.errors import StoreError
from agl_grpc.store.rollouts import commands
from agl_grpc.store.rollouts.attempts import CREATED, ROLLOUT
from agl_grpc.store.rollouts.bindings import latest_key
from agl_grpc.store.rollouts.commands import Commands
from agl_grpc.store.rollouts.dispatch import Dispatcher
from agl_grpc.store.rollouts.moves import Moves
from agl_grpc.store.rollouts.rows import queues_with_work
from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import event_pb2

_RUN = int(event_pb2.ENTITY_KIND_RUN)
_RESOURCES = int(event_pb2.ENTITY_KIND_RESOURCES)


class Neighbours:
    """Listens to the news of other servers. Used on the event loop."""

    def __init__(self, store: Store, moves: Moves, orders: Commands) -> None:
        self._store = store
        self._moves = moves
        self._dispatcher: Dispatcher = moves.dispatcher
        self._orders = orders
        self._newest_command = 0
        self._looking = False
        self._look_again = False
        store.on_news.append(self._news)

    def _news(self, events: Sequence[EventRow]) -> None:
        published = {
            event.run_key: event.ref
            for event in events
            if event.entity == _RESOURCES and event.kind == CREATED
        }
        for run_key, resource_key in published.items():
            self._store.spawn(self._announce(run_key, resource_key))
        work = any(event.entity in (ROLLOUT, _RUN) for event in events) and self._dispatcher.has_waiters()
        if work or self._orders.has_listeners():
            self._look_again = True
            if not self._looking:
                self._store.spawn(self._look())

    async def _announce(self, run_key: int, resource_key: int) -> None:
        workers = self._orders.connected(run_key)

        def run(tx: Tx) -> None:
            # A newer one may have been published since, here or there, and been announced first.
            if latest_key(tx.connection, run_key) == resource_key:
                self._orders.announce_resources(tx, resource_key, workers)

        if workers:
            await self._store.write(run, rows=len(workers))

    async def _look(self) -> None:
        self._looking = True
        try:
            while self._look_again:
                self._look_again = False
                if self._orders.has_listeners():
                    await self._pass_orders_on()
                if self._dispatcher.has_waiters():
                    await self._serve()
        except StoreError:
            # The database is away or this server goes; the next news begin again.
            return
        finally:
            self._looking = False

    async def _pass_orders_on(self) -> None:
        found = await self._store.read(partial(commands.newer, after=self._newest_command))
        for worker_key, command in found:
            self._newest_command = max(self._newest_command, command.command_id)
            self._orders.pass_on(worker_key, command)
        if len(found) == commands.PAGE:
            self._look_again = True

    async def _serve(self) -> None:
        queues = self._dispatcher.queue_keys()
        # Looked at without the write lock first: most of what is enqueued elsewhere is leased there.
        ready = await self._store.read(partial(queues_with_work, queue_keys=queues))
        if ready:
            await self._store.write(partial(self._lease, ready), rows=len(ready))

    def _lease(self, queue_keys: Sequence[int], tx: Tx) -> None:
        """Leases ready rollouts to those who wait in these queues. Writer's thread."""
        for waiter in self._dispatcher.waiting(queue_keys):
            if not self._moves.serve(tx, waiter) and waiter.labels is None:
                return
