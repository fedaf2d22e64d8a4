"""One connection of HTTP/2: frames in, frames out, the calls that are open on it (RFC 9113)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from agl_grpc.store import errors
from agl_grpc.store.door.http2 import frames, headers
from agl_grpc.store.door.http2.frames import Code, ConnectionFailed, Setting
from agl_grpc.store.door.http2.patience import Patience
from agl_grpc.store.door.http2.stream import RECEIVE_WINDOW, BadMessage, MessageTooLarge, Stream

if TYPE_CHECKING:
    from agl_grpc.store.door.http2.server import Http2Server

log = logging.getLogger(__name__)

FRAME_BYTES = 256 << 10
"""Largest frame that a peer may send."""

CONNECTION_WINDOW = 16 << 20
"""Bytes under way that a peer may send on all calls together."""

MOST_STREAMS = 10_000
"""Calls that may be open on one connection; a client holds further ones back by itself."""

_UNREAD_BYTES = 16 << 20  # control frames that a peer provokes and does not read
_HIGH_WATER = 1 << 20
_AT_ONCE_BYTES = 256 << 10

_OPENING = frames.settings(
    {
        Setting.MAX_CONCURRENT_STREAMS: MOST_STREAMS,
        Setting.INITIAL_WINDOW_SIZE: RECEIVE_WINDOW,
        Setting.MAX_FRAME_SIZE: FRAME_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: headers.MAX_HEADER_BYTES,
    }
) + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)


class Connection(asyncio.Protocol):
    """Serves one client.

    Attributes:
        loop: The event loop.
        max_message_bytes: Largest message either way.
        send_window: Bytes that the peer takes on all calls together.
        frame_bytes: Largest frame that the peer takes.
        paused: Whether the socket takes no more for now.
        writers: Streams with something to send that the peer does not take yet.
    """

    def __init__(self, server: Http2Server) -> None:
        self.loop = server.loop
        self.max_message_bytes = server.max_message_bytes
        self.send_window = frames.DEFAULT_WINDOW
        self.frame_bytes = frames.DEFAULT_FRAME_BYTES
        self.paused = False
        self.writers: set[Stream] = set()
        self.streams: dict[int, Stream] = {}
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._heads = headers.HeadReader()
        self._initial_window = frames.DEFAULT_WINDOW
        self._owed = 0
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._needed = len(frames.PREFACE)
        self._greeted = False
        self._last_id = 0
        self._block: tuple[int, int, list[bytes]] | None = None
        self._leaving = False
        self._patience = Patience(self.loop.time())
        self._heard = True
        self._keepalive: asyncio.TimerHandle | None = None
        self._kinds: dict[int, Callable[[int, int, bytes], None]] = {
            frames.DATA: self._data,
            frames.HEADERS: self._headers,
            frames.RST_STREAM: self._reset,
            frames.SETTINGS: self._settings,
            frames.PUSH_PROMISE: self._push,
            frames.PING: self._ping,
            frames.GOAWAY: self._ignore,
            frames.PRIORITY: self._ignore,
            frames.WINDOW_UPDATE: self._window_update,
            frames.CONTINUATION: self._continuation,
        }

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        # uvloop's transports are of classes of their own.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._server.enter(self)
        self.send(_OPENING)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: whatever works for it is cancelled."""
        self._transport = None
        self._flush()
        if self._keepalive is not None:
            self._keepalive.cancel()
        for stream in list(self.streams.values()):
            self._cancel(stream)
        self._server.leave(self)

    def pause_writing(self) -> None:
        """The socket takes no more."""
        self.paused = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self.paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        """Takes bytes in, in pieces of any size."""
        self._heard = True
        if self._rest:
            self._rest.append(data)
            self._rest_bytes += len(data)
            if self._rest_bytes < self._needed:
                return
            data = b"".join(self._rest)
            self._rest.clear()
        try:
            rest = self._frames(data, 0 if self._greeted else self._preface(data))
        except ConnectionFailed as error:
            self._fail(error)
            return
        if rest < len(data) and self._transport is not None:
            self._rest.append(data[rest:])
            self._rest_bytes = len(data) - rest

    # Frames

    def _preface(self, data: bytes) -> int:
        size = len(frames.PREFACE)
        if not frames.PREFACE.startswith(data[:size]):
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2 with prior knowledge)")
        if len(data) < size:
            self._needed = size
            return 0
        self._greeted = True
        return size

    def _frames(self, data: bytes, start: int) -> int:
        """Handles every whole frame from `start` on; returns where the first broken-off one begins."""
        end = len(data)
        kinds = self._kinds
        while self._greeted and start + frames.HEADER_BYTES <= end:
            high, low, kind, flags, stream_id = frames.UNPACK_HEADER(data, start)
            size = high << 8 | low
            if size > FRAME_BYTES:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            stop = start + frames.HEADER_BYTES + size
            if stop > end:
                self._needed = stop - start
                return start
            if self._block is not None and kind != frames.CONTINUATION:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a header block was not finished")
            handle = kinds.get(kind)
            if handle is not None:  # frames of unknown kinds are for others
                handle(flags, stream_id & 0x7FFFFFFF, data[start + frames.HEADER_BYTES : stop])
            start = stop
        if self._greeted:
            self._needed = frames.HEADER_BYTES
        return start

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = frames.unpadded(payload, flags)
        if flags & frames.END_HEADERS:
            self._open(stream_id, flags, block)
        else:
            self._block = (stream_id, flags, [block])

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, parts = self._block
        parts.append(payload)
        # Parts may be empty: a peer must not be able to send them for ever either.
        if sum(map(len, parts)) > headers.MAX_HEADER_BYTES or len(parts) > 64:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "a header block without end")
        if flags & frames.END_HEADERS:
            self._block = None
            self._open(stream_id, first_flags, b"".join(parts))

    def _open(self, stream_id: int, flags: int, block: bytes) -> None:
        if not stream_id % 2:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"stream {stream_id} was not opened by a client")
        head = self._heads.read(block)
        stream = self.streams.get(stream_id)
        if stream is not None or stream_id <= self._last_id:
            # Trailers of a request, or headers that cross with the end of their call.
            if stream is not None and flags & frames.END_STREAM:
                self._end(stream)
            return
        if self._leaving or len(self.streams) >= MOST_STREAMS:
            # Not looked at: the client may safely try it elsewhere.
            self._last_id = stream_id if not self._leaving else self._last_id
            self.send(frames.reset(stream_id, Code.REFUSED_STREAM))
            return
        self._last_id = stream_id
        stream = Stream(self, stream_id, head, self._initial_window)
        self.streams[stream_id] = stream
        if head.problem:
            stream.refuse(head.problem)
            return
        if head.timeout is not None:
            stream.timer = self.loop.call_later(head.timeout, self._overdue, stream)
        self._server.begin(stream)
        if flags & frames.END_STREAM:
            self._end(stream)

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._owed += len(payload)
        if self._owed >= CONNECTION_WINDOW // 2:
            self.send(frames.window_update(0, self._owed))
            self._owed = 0
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id and not self._leaving:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
            return
        if stream.ended:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"DATA on stream {stream_id} after its end")
        try:
            stream.receive(frames.unpadded(payload, flags & ~frames.HAS_PRIORITY), len(payload))
        except MessageTooLarge as error:
            refusal = errors.message_too_large(error.size, self.max_message_bytes)
            self._break(stream, refusal.code, refusal.message, refusal.trailers())
            self._endure()
        except BadMessage as error:
            self._break(stream, _INTERNAL, f"a message is {error}")
            self._endure()
        else:
            if flags & frames.END_STREAM:
                self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream.end()
        self._server.complete(stream)

    def _reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        frames.read_number(payload)
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._cancel(stream)
        self._endure()

    def _endure(self) -> None:
        """The peer has broken a call off, or made this side do it."""
        if self._patience.is_over(self.loop.time()):
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "begins calls only to break them off")

    def _settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & frames.ACK:
            return
        for key, value in frames.read_settings(payload):
            if key == Setting.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "an initial window above 2^31 - 1")
                for stream in self.streams.values():
                    stream.send_window += value - self._initial_window
                self._initial_window = value
            elif key == Setting.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_BYTES <= value < 1 << 24:
                    raise ConnectionFailed(Code.PROTOCOL_ERROR, "a largest frame outside 2^14 to 2^24 - 1")
                self.frame_bytes = min(value, FRAME_BYTES)
        self._reply(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._pump()

    def _ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a PING of another length than 8")
        if not flags & frames.ACK:
            self._reply(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        count = frames.read_number(payload) & 0x7FFFFFFF
        if not stream_id:
            self.send_window += count
            if not count or self.send_window > frames.LARGEST_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "a window that grows by nothing or too much")
            self._pump()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        stream.send_window += count
        if not count or stream.send_window > frames.LARGEST_WINDOW:
            self.send(frames.reset(stream_id, Code.FLOW_CONTROL_ERROR))
            self._cancel(stream)
            self._endure()
        elif stream in self.writers:
            stream.pump()

    def _push(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "a client cannot push")

    def _ignore(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        """Says nothing that matters here."""

    # Ends

    def _break(
        self, stream: Stream, code: int, text: str, metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> None:
        task = stream.task
        stream.finish(headers.trailers(code, text, metadata))
        if task is not None:
            task.cancel()

    def _overdue(self, stream: Stream) -> None:
        self._break(stream, _DEADLINE_EXCEEDED, "the deadline is over")

    def _cancel(self, stream: Stream) -> None:
        task = stream.task
        stream.lose()
        if task is not None:
            task.cancel()

    def cut(self) -> None:
        """Ends the calls that are still open, and the connection."""
        for stream in list(self.streams.values()):
            self._break(stream, _UNAVAILABLE, "the server is shutting down")
        self.close()

    def depart(self) -> None:
        """Tells the client to go elsewhere; calls that are open go on."""
        if not self._leaving:
            self._leaving = True
            self.send(frames.goaway(self._last_id, Code.NO_ERROR, "the server is shutting down"))
            self._close_when_idle()

    def forget(self, stream: Stream) -> None:
        """A stream has ended."""
        self.streams.pop(stream.stream_id, None)
        self.writers.discard(stream)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._leaving and not self.streams:
            self.close()

    def close(self) -> None:
        """Closes the connection once everything has been written."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _fail(self, error: ConnectionFailed) -> None:
        log.info("a client was disconnected: %s", error)
        self.send(frames.goaway(self._last_id, error.code, str(error)))
        self.close()

    # What leaves

    def send(self, data: bytes) -> None:
        """Writes whole frames; what is written in one turn of the loop leaves with one call of the system.

        Such a call is dear: it carries the bytes to their receiver and wakes it, while nothing else can run.
        """
        if self._transport is None:
            return
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes >= _AT_ONCE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(self._out[0] if len(self._out) == 1 else b"".join(self._out))
        self._out.clear()
        self._out_bytes = 0

    def _reply(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() > _UNREAD_BYTES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "asks much and reads nothing")
        self.send(data)

    def _pump(self) -> None:
        for stream in list(self.writers):
            stream.pump()

    # Is anybody there?

    def _watch(self) -> None:
        self._keepalive = self.loop.call_later(self._server.keepalive_seconds, self._probe)

    def _probe(self) -> None:
        if self._heard:
            self._heard = False
            self._watch()
            return
        self.send(frames.frame(frames.PING, 0, 0, b"keepaliv"))
        self._keepalive = self.loop.call_later(self._server.keepalive_timeout, self._judge)

    def _judge(self) -> None:
        if self._heard:
            self._probe()
        elif self._transport is not None:
            log.info("a client does not answer any more; its connection is closed")
            self._transport.abort()


_DEADLINE_EXCEEDED, _INTERNAL, _UNAVAILABLE = 4, 13, 14
