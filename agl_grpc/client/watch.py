"""Server streams that survive disconnects: they resume after the last cursor that was seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from agl_grpc.client.channel import is_transient
from agl_grpc.client.errors import error_from_rpc, retry_after
from agl_grpc.v1 import store_service_pb2 as pb

if TYPE_CHECKING:
    from agl_grpc.client.connection import Connection

T = TypeVar("T")

_INCLUDES = ("include_existing", "include_latest")


@dataclass(slots=True, kw_only=True)
class Watched(Generic[T]):
    """What changed, and the cursor from which a later watch goes on without a gap.

    ``checkpoint`` marks an answer without changes that only moves the cursor.
    """

    items: list[T] = field(default_factory=list)
    deleted_ids: list[str] = field(default_factory=list)
    cursor: int = 0
    checkpoint: bool = False


async def watch(
    connection: Connection,
    method: Callable[[Any], Callable[..., grpc.aio.UnaryStreamCall[Any, Any]]],
    request: Any,
    read: Callable[[Any], Iterable[T]],
    read_deleted: Callable[[Any], Iterable[str]] = lambda message: (),
) -> AsyncIterator[Watched[T]]:
    """Watch for ever; raises `CursorCompacted` when the cursor has become older than the log.

    A store that stays away longer than the retry policy allows raises `StoreUnavailable`.
    """
    if not request.cursor and not any(getattr(request, flag, False) for flag in _INCLUDES):
        # "From now on" is fixed here: a stream that breaks before its first message leaves no gap.
        request.cursor = await _position(connection)
    async for message in resumed(connection, method, request, _advance, endless=True):
        yield Watched(
            items=list(read(message)),
            deleted_ids=list(read_deleted(message)),
            cursor=message.cursor,
            checkpoint=message.checkpoint,
        )


async def _position(connection: Connection) -> int:
    request = pb.GetLatestResourcesRequest(run_id=connection.run_id)
    return (await connection.call(connection.bound.store.GetLatestResources, request)).position


def _advance(request: Any, message: Any) -> None:
    if (
        not message.cursor
    ):  # what was there already, up to the first checkpoint: after a break all of it comes again
        return
    request.cursor = message.cursor
    for flag in _INCLUDES:
        if flag in request.DESCRIPTOR.fields_by_name:
            setattr(request, flag, False)


async def resumed(
    connection: Connection,
    method: Callable[[Any], Callable[..., grpc.aio.UnaryStreamCall[Any, Any]]],
    request: Any,
    advance: Callable[[Any, Any], None],
    *,
    endless: bool = False,
) -> AsyncIterator[Any]:
    """Messages of a server stream; ``advance(request, message)`` makes the request go on after a message.

    The stream ends when the server ends it without an error; an endless one is then opened again.
    """
    clock = asyncio.get_running_loop().time
    tries, silent_since = 0, clock()
    while True:
        call = method(connection.bound)(request, metadata=connection.metadata)
        try:
            async for message in call:
                tries, silent_since = 0, clock()
                advance(request, message)
                yield message
                silent_since = clock()  # the consumer's own time is not the store's silence
            if not endless:
                return
            await asyncio.sleep(connection.retry.first_wait)
        except grpc.aio.AioRpcError as error:
            wait = retry_after(error) or connection.retry.wait(tries)
            if tries == 0:
                silent_since = clock()  # a stream may be quiet for hours before it breaks
            if not is_transient(error) or clock() + wait - silent_since > connection.retry.timeout:
                raise error_from_rpc(error, connection.target) from None
            tries += 1
            await asyncio.sleep(wait)
        finally:
            call.cancel()
