"""A store without a port: its handlers, reached through a channel that never leaves the process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from agl_grpc.store.clock import Clock
from agl_grpc.store.door.app import Opened, ServeConfig
from agl_grpc.store.door.in_process import InProcessChannel
from agl_grpc.store.door.service import ServiceBinder
from agl_grpc.store.store import Store

_GRACE_SECONDS = 10.0


class _Details(NamedTuple):
    """What a generic handler wants to know of a call."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class InProcessStore:
    """A store of this event loop: no port, no other process, the same handlers, checks and rules.

    Give it to a client in place of an address: ``StoreClient(store)``. Closing it closes its clients' calls.
    Make it with `InProcessStore.open`.

    Attributes:
        store: The store itself.
        name: What messages call it.
    """

    def __init__(self, store: Store, methods: Mapping[str, Any], draining: asyncio.Event) -> None:
        self.store = store
        self.name = "in-process store"
        self._methods = methods
        self._draining = draining
        self._loop = asyncio.get_running_loop()
        self._channels: list[InProcessChannel] = []

    @classmethod
    async def open(cls, database: Path | str | None = None, clock: Clock | None = None) -> InProcessStore:
        """Opens a database.

        Args:
            database: An SQLite file or ``postgresql://user@host/name``; None = a throw-away file.
            clock: Time; None = the machine's.

        Raises:
            StartError: The database cannot be used; one line says why and what to do.
        """
        opened = await Opened.by(ServeConfig(database=database), clock)
        draining = asyncio.Event()
        binder = ServiceBinder(opened.authenticator, draining, opened.parsers)
        methods: dict[str, Any] = {}
        for service, objects in opened.services.items():
            generic = binder.bind(service, objects)
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                # gRPC's type is a class of its own; two attributes are all that it is asked for.
                methods[path] = generic.service(_Details(path))  # type: ignore[arg-type]
        return cls(opened.store, methods, draining)

    def open_channel(self) -> InProcessChannel:
        """A channel to it, for the stubs of its three services.

        Raises:
            RuntimeError: The running event loop is not the store's.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("an in-process store is used on the event loop that opened it")
        channel = InProcessChannel(self._methods, self._draining)
        self._channels.append(channel)
        return channel

    async def close(self) -> None:
        """Long polls answer, watches end, what was accepted is on disk; later calls are refused."""
        self._draining.set()
        self.store.hub.close()
        channels, self._channels = self._channels, []
        await asyncio.gather(*(channel.close(_GRACE_SECONDS) for channel in channels))
        await self.store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
