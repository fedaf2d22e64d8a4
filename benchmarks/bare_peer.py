"""The peer: gRPC alone, on the same machine, with the same clients. It answers every unary call with nothing
and passes each message of a call on to one of the streams that wait, storing nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop


class Handler(grpc.GenericRpcHandler):
    """Serves the names of the contract's methods, without their meaning."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Bidirectional for lease streams, unary for all else; requests and answers are bytes."""
        if str(handler_call_details.method).endswith("/StreamLeases"):
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, _context: Any) -> bytes:
        if self._waiting:
            self._waiting.popleft().set_result(request)
        return b""

    async def _stream(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            yield await future


async def serve() -> None:
    """Serves on a free port, which it prints, until its standard input ends."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
