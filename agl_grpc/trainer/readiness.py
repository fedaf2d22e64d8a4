"""Asking an engine over HTTP: whether it serves, and what it captured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from agl_grpc.trainer.errors import TrainerError

_PAUSE = 0.25
_TRY_SECONDS = 5.0


async def engine_serves(host: str, port: int, within: float) -> None:
    """Returns when the engine's ``/health`` answers 200; TrainerError after ``within`` seconds."""
    try:
        async with asyncio.timeout(within):
            while not await _healthy(host, port):  # noqa: ASYNC110  # another process cannot set an event
                await asyncio.sleep(_PAUSE)
    except TimeoutError as error:
        raise TrainerError(
            f"the engine at {host}:{port} did not serve within {within:g} s; see its log"
        ) from error


async def captured(host: str, port: int, within: float) -> dict[str, Any]:
    """The engine's counters of captured model calls, once none waits any more for the store.

    After ``within`` seconds as they are then: ``spool_waiting`` says how many still wait.

    Raises:
        TrainerError: the engine does not answer.
    """
    deadline = time.monotonic() + within
    while True:
        status, body = await _get(host, port, "/agl/interceptor")
        if status != 200:
            raise TrainerError(f"the engine at {host}:{port} does not say what it captured (status {status})")
        counters: dict[str, Any] = orjson.loads(body)
        # What the spool has taken meanwhile is delivered once nothing waits in it.
        ended = counters["delivered"] + counters["spooled"] + counters["rejected"]
        settled = ended >= counters["captured"] and not counters["spool_waiting"]
        if settled or time.monotonic() > deadline:
            return counters
        await asyncio.sleep(_PAUSE)


def summed(counters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counters of several engines as one: numbers are added up; of one engine, all that it says."""
    if len(counters) == 1:
        return dict(counters[0])
    names = dict.fromkeys(name for each in counters for name, value in each.items() if type(value) is int)
    return {name: sum(each.get(name, 0) for each in counters) for name in names}


async def _healthy(host: str, port: int) -> bool:
    return (await _get(host, port, "/health"))[0] == 200


async def _get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET; status 0 when there was no answer."""
    request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode()
    try:
        async with asyncio.timeout(_TRY_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                await writer.drain()
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(maxsplit=2)[1:2]
    return (int(status[0]), body) if status else (0, b"")
