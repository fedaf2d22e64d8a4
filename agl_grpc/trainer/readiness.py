"""Waiting until an engine serves."""

from __future__ import annotations

import asyncio

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


async def _healthy(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_TRY_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]
