"""The door's HTTP/2: beside gRPC's own client a strict one, a slow one, a broken one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import zlib
from typing import Any

import grpc
import h2.events
import h2.settings
import pytest

from agl_grpc.client.errors import error_from_rpc
from agl_grpc.store.door.http2 import frames
from agl_grpc.store.door.http2.patience import MOST_RESETS
from agl_grpc.store.door.http2.stream import RECEIVE_WINDOW
from tests.store.http2_peer import MAX_MESSAGE, StrictPeer, echoing, strict_peer
from tests.support.waiting import eventually

BIG = 3 * RECEIVE_WINDOW + 12_345


def client(port: int, **options: Any) -> grpc.aio.Channel:
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=limits, **options)


@pytest.mark.parametrize("size", [0, 1, 16_384 - 5, 16_384, 65_536, BIG])
async def test_messages_of_any_size_come_back(size: int) -> None:
    data = os.urandom(size)
    async with echoing() as (_, _, port), client(port) as channel:
        assert await channel.unary_unary("/t/Unary")(data) == data
        stream = channel.stream_stream("/t/Stream")()
        for _ in range(3):
            await stream.write(data)
            assert await stream.read() == data
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert [one async for one in channel.unary_stream("/t/Many")(data[:100_000])] == [data[:100_000]] * 64


async def test_a_thousand_calls_at_once_on_one_connection() -> None:
    async with echoing() as (_, _, port), client(port) as channel:
        call = channel.unary_unary("/t/Unary")
        sent = [os.urandom(number % 700) for number in range(1000)]
        assert await asyncio.gather(*(call(one) for one in sent)) == sent


@pytest.mark.parametrize("piece", [1, 7, 9, 4096])
async def test_bytes_may_arrive_in_pieces_of_any_size(piece: int) -> None:
    async with echoing() as (_, _, port), strict_peer(port) as peer:
        # A header block of several frames, messages that share and span frames.
        notes = [(f"note-{number}", os.urandom(700).hex()) for number in range(20)]
        first = peer.call("/t/Stream", b"a" * 3000, b"", b"b", notes=notes)
        await peer.flush(piece)
        data, last = await peer.answer(first)
        expected = b"".join(b"\0" + len(one).to_bytes(4, "big") + one for one in (b"a" * 3000, b"", b"b"))
        assert (data, last["grpc-status"]) == (expected, "0")


async def test_a_peer_with_small_windows_is_never_sent_more_than_it_takes() -> None:
    async with echoing() as (_, _, port), strict_peer(port) as peer:
        # The strict client raises as soon as a window is overrun.
        peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100})
        await peer.flush()
        call = peer.call("/t/Unary", b"x" * 5000)
        await peer.flush()
        data, last = await peer.answer(call)
        assert (data[5:], last["grpc-status"]) == (b"x" * 5000, "0")


async def test_a_caller_is_held_back_while_its_messages_are_not_read() -> None:
    async with echoing() as (_, echo, port), client(port) as channel:
        call = channel.stream_stream("/t/Lazy")()
        message, sent = bytes(256 << 10), 0

        async def send() -> None:
            nonlocal sent
            for _ in range(64):
                await call.write(message)
                sent += 1

        sending = asyncio.create_task(send())
        await echo.started.wait()
        # As long as it goes on; what one message does not use up of the windows is not known exactly.
        before = -1
        while before != sent:
            before = sent
            await asyncio.wait([sending], timeout=0.3)
        assert sent * len(message) <= 4 * RECEIVE_WINDOW
        # Others on the same connection are not held up.
        assert await channel.unary_unary("/t/Unary")(b"y") == b"y"
        echo.go.set()
        await sending
        await call.done_writing()
        assert int(await call.read()) == 64 * len(message)


async def test_metadata_and_status_travel_both_ways() -> None:
    async with echoing() as (_, echo, port), client(port) as channel:
        call = channel.unary_unary("/t/Notes")(b"", metadata=(("k", "v"), ("b-bin", b"\x00\xfe")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert {("k", "v"), ("b-bin", b"\x00\xfe")} <= set(echo.notes)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "100 % größer\n"
        assert dict(caught.value.trailing_metadata() or ()) == {"note-bin": b"\0\xff", "note": "x"}


async def test_the_same_bytes_of_headers_mean_the_same_only_while_the_table_is_the_same() -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chance = random.Random(seed)
    async with echoing() as (_, echo, port), strict_peer(port) as peer:
        for _ in range(300):
            # Few different values, and enough of them to push each other out of the table.
            notes = [(f"k{chance.randrange(40)}", str(chance.randrange(3)) * 100) for _ in range(4)]
            call = peer.call("/t/Notes", b"", notes=notes)
            await peer.flush()
            await peer.answer(call)
            assert [one for one in echo.notes if one[0].startswith("k")] == notes


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_read(how: grpc.Compression) -> None:
    async with echoing() as (_, _, port), client(port, compression=how) as channel:
        assert await channel.unary_unary("/t/Unary")(b"z" * 100_000) == b"z" * 100_000


async def test_what_cannot_be_served_is_refused_alone() -> None:
    async with echoing() as (_, _, port), client(port) as channel:
        too_large = ("MESSAGE_TOO_LARGE", {"limit_bytes": str(MAX_MESSAGE)})
        unknown = ("METHOD_UNIMPLEMENTED", {"method": "/t/Nothing"})
        for path, data, code, reason in (
            ("/t/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED, unknown),
            ("/t/Broken", b"", grpc.StatusCode.UNKNOWN, ("", {})),
            ("/t/Unary", bytes(MAX_MESSAGE + 1), grpc.StatusCode.RESOURCE_EXHAUSTED, too_large),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(path)(data)
            assert caught.value.code() is code
            found = error_from_rpc(caught.value, "x")
            assert (found.reason, found.metadata) == reason
        assert await channel.unary_unary("/t/Unary")(b"on") == b"on"


async def test_a_small_message_that_unpacks_to_a_huge_one_is_refused() -> None:
    async with echoing() as (_, _, port), strict_peer(port) as peer:
        bomb = zlib.compress(bytes(MAX_MESSAGE + 1))
        call = peer.call("/t/Unary", notes=[("grpc-encoding", "deflate")], end=False)
        peer.h2.send_data(call, b"\1" + len(bomb).to_bytes(4, "big") + bomb, end_stream=True)
        await peer.flush()
        _, last = await peer.answer(call)
        assert last["grpc-status"] == "8"


async def test_what_is_no_grpc_is_answered_as_http() -> None:
    async with echoing() as (_, _, port), strict_peer(port) as peer:
        fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")]
        peer.h2.send_headers(1, fields, end_stream=True)
        await peer.flush()
        _, last = await peer.answer(1)
        assert last[":status"] == "405"


async def test_a_handler_ends_with_its_call() -> None:
    async with echoing() as (_, echo, port):
        async with client(port) as channel:
            call = channel.unary_unary("/t/Wait")(b"")
            await echo.started.wait()
            call.cancel()
            await asyncio.wait_for(echo.cancelled.wait(), 10)
            echo.cancelled.clear()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/t/Wait")(b"", timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(echo.cancelled.wait(), 10)
            echo.cancelled.clear()
            echo.started.clear()
        async with strict_peer(port) as peer:
            peer.call("/t/Wait", b"")
            await peer.flush()
            await echo.started.wait()
        # The connection is gone.
        await asyncio.wait_for(echo.cancelled.wait(), 10)


async def test_a_server_that_stops_lets_calls_end_and_takes_no_new_ones() -> None:
    async with echoing() as (server, echo, port), strict_peer(port) as peer:
        call = peer.call("/t/Wait", b"last")
        await peer.flush()
        await echo.started.wait()
        stopping = asyncio.create_task(server.stop(10))
        while not any(isinstance(event, h2.events.ConnectionTerminated) for event in await peer.events()):
            pass
        echo.go.set()
        # Closed after the last answer; h2 takes nothing in after GOAWAY, so the bytes are looked at.
        rest = await asyncio.wait_for(peer._reader.read(), 10)
        assert b"\0\0\0\0\4last" in rest
        assert call == 1
        await stopping


async def test_calls_that_outlast_the_grace_are_cut() -> None:
    async with echoing() as (server, echo, port), client(port) as channel:
        call = channel.unary_unary("/t/Wait")(b"")
        await echo.started.wait()
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_peer_that_is_there_but_answers_nothing_is_given_up() -> None:
    async with echoing(keepalive_seconds=0.05, keepalive_timeout=0.05) as (_, echo, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(frames.PREFACE + frames.settings({}))
        assert await asyncio.wait_for(reader.read(), 10)  # until the end
        writer.close()
        async with client(port) as channel:
            # A client that answers is kept.
            call = asyncio.ensure_future(channel.unary_unary("/t/Wait")(b"there"))
            await asyncio.wait([call], timeout=0.5)
            echo.go.set()
            assert await call == b"there"


BROKEN = {
    "http/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4,
    "frame too large": frames.header(1 << 23, frames.DATA, 0, 1),
    "even stream": frames.frame(frames.HEADERS, frames.END_HEADERS, 2, b"\x83"),
    "continuation of nothing": frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, b"\x83"),
    "interrupted headers": frames.frame(frames.HEADERS, 0, 1, b"\x83")
    + frames.frame(frames.PING, 0, 0, bytes(8)),
    "headers without end": frames.frame(frames.HEADERS, 0, 1, b"\x83")
    + frames.frame(frames.CONTINUATION, 0, 1, b"") * 100,
    "unknown table entry": frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\x7f"),
    "data on no stream": frames.frame(frames.DATA, 0, 1, b"x"),
    "window of nothing": frames.window_update(0, 0),
    "window too large": frames.window_update(0, frames.LARGEST_WINDOW),
    "settings of a wrong length": frames.frame(frames.SETTINGS, 0, 0, b"x"),
    "short ping": frames.frame(frames.PING, 0, 0, b"x"),
    "more padding than payload": frames.frame(
        frames.HEADERS, frames.END_HEADERS | frames.PADDED, 1, b"\xff\x83"
    ),
    "push": frames.frame(frames.PUSH_PROMISE, 0, 1, b"xxxx"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_peer_that_breaks_the_protocol_is_told_and_disconnected(name: str) -> None:
    async with echoing() as (_, _, port), client(port) as channel:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((b"" if name == "http/1" else frames.PREFACE) + BROKEN[name])
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        kinds = []
        while answer:
            high, low, kind, _, _ = frames.UNPACK_HEADER(answer, 0)
            kinds.append(kind)
            answer = answer[frames.HEADER_BYTES + (high << 8 | low) :]
        assert kinds[-1] == frames.GOAWAY
        assert await channel.unary_unary("/t/Unary")(b"on") == b"on"


async def test_random_damage_harms_nobody_else() -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chance = random.Random(seed)

    async def damaged(port: int, data: bytearray) -> None:
        for _ in range(chance.randrange(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):  # the server closed with bytes of ours unread
            await asyncio.wait_for(reader.read(), 10)
        writer.close()

    async with echoing() as (server, echo, port), client(port) as channel:
        echo.go.set()
        for _ in range(300):
            peer = StrictPeer(asyncio.StreamReader(), None)  # type: ignore[arg-type]  # never connected
            for path in ("/t/Unary", "/t/Stream", "/t/Wait", "/t/Notes"):
                peer.call(path, os.urandom(chance.randrange(300)), notes=[("k", "v" * chance.randrange(50))])
            await damaged(port, bytearray(peer.h2.data_to_send()))
        assert await channel.unary_unary("/t/Unary")(b"on") == b"on"
        await channel.close()
        await eventually(
            lambda: not server._connections and not server._tasks,
            within=10,
            what="nothing left of any of them",
        )


async def test_a_peer_that_begins_calls_only_to_break_them_off_is_sent_away() -> None:
    async with echoing() as (server, echo, port), strict_peer(port) as peer, client(port) as channel:
        await channel.unary_unary("/t/Unary")(b"before")
        code = None
        for _ in range(3 * MOST_RESETS // 100):
            for _ in range(100):
                peer.h2.reset_stream(peer.call("/t/Wait", b"x"), 8)
            await peer.flush()
            code = await _farewell(peer, seconds=0.01)
            if code is not None:
                break
        if code is None:
            code = await _farewell(peer, seconds=10)
        assert code == frames.Code.ENHANCE_YOUR_CALM
        # Whatever was begun is over, and others notice nothing.
        await eventually(lambda: not server._tasks)
        assert await channel.unary_unary("/t/Unary")(b"after") == b"after"
        assert not echo.go.is_set()


async def test_a_client_may_break_off_a_fleets_worth_of_calls_at_once() -> None:
    async with echoing() as (server, _, port), client(port) as channel:
        calls = [channel.unary_unary("/t/Wait")(b"x") for _ in range(MOST_RESETS // 2)]
        await eventually(lambda: len(server._tasks) == len(calls))
        for call in calls:
            call.cancel()
        await eventually(lambda: not server._tasks)
        assert await channel.unary_unary("/t/Unary")(b"after") == b"after"


async def _farewell(peer: StrictPeer, seconds: float) -> int | None:
    """The code with which the server ends the connection; None = it has not, so far."""
    try:
        async with asyncio.timeout(seconds):
            while events := await peer.events():
                for event in events:
                    if isinstance(event, h2.events.ConnectionTerminated):
                        return int(event.error_code)
    except TimeoutError:
        return None
    raise AssertionError("the connection was closed without a word")


async def test_no_more_of_an_answer_waits_in_memory_than_the_socket_takes() -> None:
    async with echoing() as (server, _, port), client(port) as channel:
        call = channel.unary_unary("/t/Unary")
        await call(b"connected")
        (connection,) = server._connections
        connection.pause_writing()
        waiting = asyncio.ensure_future(call(bytes(BIG)))
        await eventually(lambda: bool(connection.writers))
        (stream,) = connection.writers
        assert sum(map(len, stream._out)) > BIG - (256 << 10)
        connection.resume_writing()
        assert await waiting == bytes(BIG)
