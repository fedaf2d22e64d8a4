"""A store client for commands that read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agl_grpc_cli.errors import CliError

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient

T = TypeVar("T")

ANSWER_SECONDS = 5.0


def with_store(address: str, run_id: str, work: Callable[[StoreClient], Awaitable[T]]) -> T:
    """Runs `work` with a client of the store; what the store refuses becomes a one-line error.

    A store that does not answer within 5 s counts as not there.
    """
    from agl_grpc.client import RetryPolicy, StoreClient, StoreError

    async def run() -> T:
        async with StoreClient(address, run_id=run_id, retry=RetryPolicy(timeout=ANSWER_SECONDS)) as client:
            return await work(client)

    try:
        return asyncio.run(run())
    except StoreError as error:
        raise CliError(str(error)) from error
    except ValueError as error:
        raise CliError(str(error)) from error


def with_database(database: Path, run_id: str, work: Callable[[StoreClient], Awaitable[T]]) -> T:
    """As `with_store`, on a database that no store serves: one is served here for as long as it takes."""
    from agl_grpc.client import StoreClient, StoreError
    from agl_grpc.store.door.app import ServeConfig, StoreServer
    from agl_grpc.store.door.server import StartError

    async def run() -> T:
        server = await StoreServer.start(ServeConfig(port=0, database=database))
        try:
            async with StoreClient(server.address, run_id=run_id) as client:
                return await work(client)
        finally:
            await server.stop()

    try:
        return asyncio.run(run())
    except (StartError, StoreError) as error:
        raise CliError(str(error)) from error
