"""Several processes of one proxy: a connection goes to the process that keeps its rollout's state.

What a proxy remembers of a rollout (its limits, its retries, its conversations, its seeds) lies in the memory
of one process. All processes accept connections from one listening socket; one that reads the head of a
request whose rollout another process keeps hands the connection over, with what it has read of it. Clients
notice nothing, and the request is parsed twice but forwarded by nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agl_grpc.interceptor.attribution import (
    attribution_of_credential,
    attribution_of_headers,
    credential_of,
    parse_path,
)

logger = logging.getLogger("agl_grpc.interceptor")

_CONNECTION = b"c"
_STATUS = b"s"
_STATUS_SECONDS = 2.0
_MOST_STATUS_BYTES = 1024 * 1024


class Share(NamedTuple):
    """What one of several processes is given: its number, the listening socket, where it hears of connections
    and where it tells the others of them (by number).
    """

    number: int
    listening: socket.socket
    receiving: socket.socket
    sending: Sequence[socket.socket]


def key_of(target: str, headers: Mapping[str, str]) -> str:
    """Whose state a request needs: its rollout, or its external session; empty when it needs none."""
    parsed = parse_path(target.partition("?")[0])
    if parsed is not None:
        return parsed[0].rollout_id
    named = attribution_of_credential(credential_of(headers)) or attribution_of_headers(headers)
    return headers.get("x-agl-session", "") if named is None else named.rollout_id


class Peers:
    """The processes of a proxy as one of them sees them.

    Args:
        share: what this one was given.
        take: serves a connection of which so many bytes have been read.
        describe: the counters of this process.
    """

    def __init__(
        self,
        share: Share,
        take: Callable[[socket.socket, bytes], None],
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self._share = share
        self._take = take
        self._describe = describe
        self._waiting: dict[int, deque[tuple[bytes, list[int]]]] = {}
        self._loop = asyncio.get_running_loop()
        self.given = 0
        for each in (share.receiving, *share.sending):
            each.setblocking(False)
        self._loop.add_reader(share.receiving.fileno(), self._receive)

    def elsewhere(self, target: str, headers: Mapping[str, str]) -> int | None:
        """The number of the process that has to serve a request; None for this one."""
        key = key_of(target, headers)
        owner = zlib.crc32(key.encode()) % len(self._share.sending) if key else self._share.number
        return None if owner == self._share.number else owner

    def give(self, owner: int, connection: int, data: bytes) -> None:
        """Hand over a connection's file descriptor, which this takes, and what was read of it."""
        read = os.memfd_create("request")
        view = memoryview(data)
        while view:
            view = view[os.write(read, view) :]
        self.given += 1
        self._send(owner, _CONNECTION, [connection, read])

    async def status(self) -> dict[str, Any]:
        """The counters of all processes: sums, and each one's own."""
        others = [number for number in range(len(self._share.sending)) if number != self._share.number]
        found = [self._own(), *await asyncio.gather(*map(self._ask, others))]
        known = sorted((each for each in found if each), key=lambda each: each["worker"])
        return _together(known)

    def close(self) -> None:
        """Hear of no more connections."""
        self._loop.remove_reader(self._share.receiving.fileno())

    def _own(self) -> dict[str, Any]:
        who = {"worker": self._share.number, "pid": os.getpid(), "handed_over": self.given}
        return {**self._describe(), **who}

    async def _ask(self, number: int) -> dict[str, Any]:
        """The counters of another process; empty when it does not answer."""
        ours, theirs = socket.socketpair()
        self._send(number, _STATUS, [theirs.detach()])
        reader, writer = await asyncio.open_connection(sock=ours, limit=_MOST_STATUS_BYTES)
        try:
            async with asyncio.timeout(_STATUS_SECONDS):
                answer: dict[str, Any] = orjson.loads(await reader.read(-1))
                return answer
        except (TimeoutError, orjson.JSONDecodeError, OSError):
            return {}
        finally:
            writer.close()

    def _send(self, number: int, kind: bytes, descriptors: list[int]) -> None:
        waiting = self._waiting.setdefault(number, deque())
        waiting.append((kind, descriptors))
        if len(waiting) == 1:
            self._flush(number)

    def _flush(self, number: int) -> None:
        """Send what waits for a process; the rest when it has read some."""
        waiting, sending = self._waiting[number], self._share.sending[number]
        while waiting:
            kind, descriptors = waiting[0]
            try:
                socket.send_fds(sending, [kind], descriptors)
            except BlockingIOError:
                self._loop.add_writer(sending.fileno(), self._flush, number)
                return
            except OSError as error:
                logger.error("a connection was not handed over: %s", error.strerror)
            for descriptor in descriptors:
                os.close(descriptor)
            waiting.popleft()
        self._loop.remove_writer(sending.fileno())

    def _receive(self) -> None:
        while True:
            try:
                kind, descriptors, _, _ = socket.recv_fds(self._share.receiving, 1, 2)
            except BlockingIOError:
                return
            if not kind:
                self.close()  # nobody is left who could send
                return
            if kind == _CONNECTION and len(descriptors) == 2:
                self._take(socket.socket(fileno=descriptors[0]), _content(descriptors[1]))
            elif kind == _STATUS and descriptors:
                task = asyncio.ensure_future(self._tell(socket.socket(fileno=descriptors[0])))
                task.add_done_callback(_said)
            else:
                logger.error("what another process handed over did not arrive: too many open files?")

    async def _tell(self, asking: socket.socket) -> None:
        asking.setblocking(False)
        try:
            await self._loop.sock_sendall(asking, orjson.dumps(self._own()))
        finally:
            asking.close()


def _said(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("counters not told: %s", error)


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def _together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counters summed, what is true of one is true of all; the engines with the requests of all."""
    total = dict(found[0])
    for name in ("worker", "pid"):
        total.pop(name)
    for each in found[1:]:
        for name, value in each.items():
            if isinstance(value, bool):
                total[name] = total.get(name, False) or value
            elif isinstance(value, int) and name in total:
                total[name] += value
            elif name == "refusals":
                total[name] = {**Counter(total[name]) + Counter(value)}
    engines: dict[tuple[str, str], dict[str, Any]] = {}
    for engine in (engine for each in found for engine in each["upstreams"]):
        known = engines.setdefault((engine["model"], engine["url"]), {**engine, "in_flight": 0})
        known["in_flight"] += engine["in_flight"]
        known["healthy"] &= engine["healthy"]
    own = [{name: value for name, value in each.items() if name != "upstreams"} for each in found]
    return {**total, "upstreams": list(engines.values()), "workers": own}
