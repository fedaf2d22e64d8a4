"""A TCP proxy between clients and the store that cuts connections and loses answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to ports of the loopback interface: each to one that answers, at random.

    Attributes:
        address: Where clients connect.
        cuts: Connections that were reset.
    """

    def __init__(self, *target_ports: int) -> None:
        self.address = ""
        self.cuts = 0
        self._targets = target_ports
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self._losing = False

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        links = list(self._links)
        self.cut()
        await asyncio.gather(*links, return_exceptions=True)

    def cut(self) -> None:
        """Resets every connection."""
        for writers in self._links.values():
            self.cuts += 1
            for writer in writers:
                _reset(writer)

    async def lose_answers(self, seconds: float) -> None:
        """For so long requests go through and answers do not; then the connections are reset."""
        self._losing = True
        await asyncio.sleep(seconds)
        # First: what an answer of before was cut out of is of no use to anybody.
        self.cut()
        self._losing = False

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        way = await self._way()
        if way is None:
            # The store is down: so is the way to it.
            _reset(writer)
            return
        there, to = way
        self._links[task] = (writer, to)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, to, answers=False))
                tasks.create_task(self._pump(there, writer, answers=True))
        finally:
            del self._links[task]

    async def _way(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for port in random.sample(self._targets, len(self._targets)):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", port)
        return None

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not (answers and self._losing):
                    writer.write(data)
                    await writer.drain()
        _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with a TCP reset, as a machine that vanishes would."""
    made: socket.socket | None = writer.get_extra_info("socket")
    if made is not None and made.fileno() >= 0:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
