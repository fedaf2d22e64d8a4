"""What the tests of the door talk with: a server that echoes, a strict client of HTTP/2."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events

from agl_grpc.store.door.http2.server import Http2Server
from agl_grpc.store.door.server import listening_sockets

MAX_MESSAGE = 16 << 20


class Echo(grpc.GenericRpcHandler):
    """`/t/Unary` and `/t/Stream` answer what they get, `/t/Wait` when it is told to; see below for more."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.notes: Any = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        name = handler_call_details.method.rpartition("/")[2].lower()
        method = getattr(self, f"serve_{name}", None)
        if method is None:
            return None
        if name in ("stream", "lazy"):
            return grpc.stream_stream_rpc_method_handler(method)
        if name == "many":
            return grpc.unary_stream_rpc_method_handler(method)
        return grpc.unary_unary_rpc_method_handler(method)

    async def serve_unary(self, request: bytes, _context: Any) -> bytes:
        return request

    async def serve_notes(self, _request: bytes, context: Any) -> bytes:
        self.notes = context.invocation_metadata()
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, "100 % größer\n", [("note-bin", b"\0\xff"), ("note", "x")]
        )
        raise AssertionError

    async def serve_broken(self, _request: bytes, _context: Any) -> bytes:
        raise ValueError("a defect")

    async def serve_many(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for _ in range(64):
            yield request

    async def serve_stream(self, _requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    async def serve_lazy(self, _requests: Any, context: Any) -> None:
        self.started.set()
        await self.go.wait()
        size = 0
        while (message := await context.read()) is not grpc.aio.EOF:
            size += len(message)
        await context.write(str(size).encode())

    async def serve_wait(self, request: bytes, _context: Any) -> bytes:
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request


@asynccontextmanager
async def echoing(
    tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[tuple[Http2Server, Echo, int]]:
    """A server, its handlers, its port."""
    server = Http2Server(max_message_bytes=MAX_MESSAGE, **options)
    echo = Echo()
    server.add_generic_rpc_handlers([echo])
    sockets = listening_sockets("127.0.0.1", 0)
    await server.listen(sockets, tls)
    try:
        yield server, echo, sockets[0].getsockname()[1]
    finally:
        await server.stop(0)


class StrictPeer:
    """A client made of the `h2` package, which refuses whatever breaks the protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.writer = writer
        self._reader = reader
        self.h2.initiate_connection()

    async def flush(self, piece: int = 0) -> None:
        """Sends what waits, in pieces of so many bytes if given."""
        data = self.h2.data_to_send()
        for start in range(0, len(data), piece or len(data) or 1):
            self.writer.write(data[start : start + (piece or len(data))])
            if piece:
                await self.writer.drain()
                await asyncio.sleep(0)

    async def events(self) -> list[Any]:
        """What comes next; empty = the server has closed the connection."""
        data = await asyncio.wait_for(self._reader.read(1 << 16), 10)
        found = self.h2.receive_data(data) if data else []
        await self.flush()
        return list(found)

    def call(self, path: str, *messages: bytes, notes: Any = (), end: bool = True) -> int:
        """Begins a call; small messages only (the windows must let them pass)."""
        stream_id = self.h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
        fields += [("te", "trailers"), ("content-type", "application/grpc"), *notes]
        self.h2.send_headers(stream_id, fields)
        for message in messages:
            self.h2.send_data(stream_id, b"\0" + len(message).to_bytes(4, "big") + message)
        if end:
            self.h2.end_stream(stream_id)
        return int(stream_id)

    async def answer(self, stream_id: int) -> tuple[bytes, dict[str, str]]:
        """Data and trailers (or the only headers) of a call."""
        data, last = b"", {}
        while True:
            events = await self.events()
            assert events, "the connection was closed"
            for event in events:
                if getattr(event, "stream_id", None) != stream_id:
                    continue
                if isinstance(event, h2.events.DataReceived):
                    data += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
                elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    last = dict(event.headers)
                elif isinstance(event, h2.events.StreamEnded):
                    await self.flush()
                    return data, last
            await self.flush()


@asynccontextmanager
async def strict_peer(port: int) -> AsyncIterator[StrictPeer]:
    """Connected."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = StrictPeer(reader, writer)
    try:
        yield peer
    finally:
        writer.close()
        await writer.wait_closed()
