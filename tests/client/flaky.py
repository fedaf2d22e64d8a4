"""A TCP proxy that cuts connections when told, so that a client meets a real network's faults."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self


class FlakyProxy:
    """Forwards to ``host:port``; `cut` resets every connection, `refuse` turns new ones away for a while."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self._server: asyncio.Server | None = None
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        """Where to connect."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection now; ``refuse`` turns new ones away until `accept`."""
        self._refusing = refuse
        for writer in list(self._writers):
            writer.transport.abort()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        pair = {writer, up_writer}
        self._writers |= pair
        copies = {
            asyncio.create_task(_copy(reader, up_writer)),
            asyncio.create_task(_copy(up_reader, writer)),
        }
        self._tasks |= copies
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for end in pair:
            end.transport.abort()
        await asyncio.gather(*copies, return_exceptions=True)
        self._writers -= pair
        self._tasks -= copies


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, RuntimeError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
