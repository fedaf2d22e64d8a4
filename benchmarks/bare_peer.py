"""The peer: gRPC's own asyncio server, on the same machine, with the same clients.

It answers every unary call with nothing, acknowledges every span message, passes calls on to lease streams
that wait, and stores nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Any

import grpc
import uvloop

from agl_grpc.v1 import store_service_pb2 as store


class Handler(grpc.GenericRpcHandler):
    """Serves the names of the contract's methods, without their meaning."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Bidirectional for streams, unary for all else; requests and answers are bytes."""
        method = str(handler_call_details.method)
        if method.endswith("/StreamLeases"):
            return grpc.stream_stream_rpc_method_handler(self._leases)
        if method.endswith("/StreamSpans"):
            return grpc.stream_stream_rpc_method_handler(self._spans)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, _context: Any) -> bytes:
        if self._waiting:
            self._waiting.popleft().set_result(request)
        return b""

    async def _leases(self, _requests: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await context.write(await future)

    async def _spans(self, _requests: Any, context: Any) -> None:
        number = 0
        while await context.read() is not grpc.aio.EOF:
            ack = store.StreamSpansResponse(ack=store.SpanStreamAck(sequence=number))
            opened = store.StreamSpansResponse(opened=store.SpanStreamOpened(epoch=1))
            await context.write((ack if number else opened).SerializeToString())
            number += 1


async def serve() -> None:
    """Serves on a free port, which it prints, until its standard input ends."""
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
