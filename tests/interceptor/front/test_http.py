"""The proxy's own HTTP: what clients and engines may send, and what becomes of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from agl_grpc.interceptor.front.http.door import BodyTooLarge, Door, Incoming
from agl_grpc.interceptor.front.http.engines import (
    BrokenOff,
    CannotConnect,
    EngineClient,
    NoAnswer,
    NotHttp,
)
from tests.support.waiting import eventually, free_port

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
POST = b"POST /v1/x?y=%%20z HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b"


async def echo(request: Incoming) -> None:
    """Method, target and body as they came."""
    try:
        body = await request.read()
    except BodyTooLarge:
        request.answer(413, (), b"large")
        return
    request.answer(200, ((b"x-of", b"echo"),), f"{request.method} {request.target} ".encode() + body)


@asynccontextmanager
async def door(
    handle: Callable[[Incoming], Awaitable[None]], max_body: int = 1000
) -> AsyncIterator[tuple[Door, int]]:
    """An open door and its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    opened = Door(handle, max_body)
    await opened.open(listening)
    try:
        yield opened, listening.getsockname()[1]
    finally:
        opened.close()
        await opened.shutdown()


async def said(port: int, *pieces: bytes, until: bytes = b"") -> bytes:
    """What a client that sends these pieces is answered, up to `until` or the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            return await (reader.readuntil(until) if until else reader.read())
    finally:
        writer.close()


async def test_requests_are_served_one_after_the_other_on_one_connection() -> None:
    async with door(echo) as (_, port):
        last = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        answer = await said(port, POST % (3, b"one") + POST % (3, b"two") + last)
    bodies = [part.rpartition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert bodies == [b"POST /v1/x?y=%20z one", b"POST /v1/x?y=%20z two", b"GET / "]
    assert answer.count(b"x-of: echo") == 3
    assert answer.count(b"connection: close") == 1


async def test_bodies_come_in_chunks_in_pieces_and_after_a_continue() -> None:
    async with door(echo) as (_, port):
        head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        chunked = await said(port, head, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n", until=b"abcde")
        assert b" 200 OK" in chunked
        request = POST % (5, b"pieces"[:5])
        assert await said(port, *(request[i : i + 9] for i in range(0, 99, 9)), until=b"piece")
        expecting = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n"
        assert (await said(port, expecting, until=b"Continue\r\n\r\n")).startswith(b"HTTP/1.1 100")
        assert await said(port, b"GET / HTTP/1.0\r\n\r\n") == (
            b"HTTP/1.1 200 OK\r\nx-of: echo\r\ncontent-length: 6\r\nconnection: close\r\n\r\nGET / "
        )


async def test_what_is_too_large_is_refused_and_the_connection_goes_on() -> None:
    async with door(echo) as (_, port):
        large = POST % (5000, b"x" * 5000)
        answer = await said(port, large + POST % (3, b"end"), until=b"end")
        assert [line[:3] for line in answer.split(b"HTTP/1.1 ")[1:]] == [b"413", b"200"]
        chunks = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + b"200\r\n%b\r\n" % (
            b"y" * 512
        )
        assert b"413" in await said(port, chunks, b"200\r\n%b\r\n" % (b"y" * 512), until=b"large")
        fields = b"".join(b"x-%d: %b\r\n" % (number, b"z" * 1000) for number in range(100))
        assert b" 431 " in await said(port, b"GET / HTTP/1.1\r\n" + fields + b"\r\n")


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"HELLO\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_a_400(rubbish: bytes) -> None:
    async with door(echo) as (_, port):
        answer = await said(port, rubbish)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in answer


async def test_an_offered_upgrade_is_not_taken() -> None:
    async with door(echo) as (_, port):
        head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        answer = await said(port, head + b"content-length: 4\r\n\r\nbody", until=b"body")
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_a_client_that_leaves_cancels_its_request_and_a_defect_is_a_500(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: list[str] = []

    async def waiting(request: Incoming) -> None:
        if request.method == "GET":
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(request.target)
            raise

    async with door(waiting) as (opened, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST % (0, b""))
        await eventually(lambda: any(each.busy for each in opened.connections), what="the request")
        writer.close()
        await eventually(lambda: ended, what="the end")
        assert b" 500 " in await said(port, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert "ZeroDivisionError" in caplog.text
        await eventually(lambda: not opened.connections, what="closed connections")


async def test_a_stream_waits_for_a_client_that_does_not_read() -> None:
    sent = 0

    async def endless(request: Incoming) -> None:
        nonlocal sent
        stream = request.stream(200, ())
        for _ in range(1000):
            await stream.write(b"x" * 65536)
            sent += 1
        stream.end()

    async with door(endless) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await reader.readuntil(b"chunked\r\n\r\n")
        before = -1
        while sent != before:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.05)
        assert 0 < sent < 500
        size = 0
        while chunk := await reader.read(1 << 20):
            size += len(chunk)
            if chunk.endswith(b"\r\n0\r\n\r\n"):
                break
        assert sent == 1000
        assert size > 1000 * 65536
        writer.close()


class Engine:
    """Answers each request with the next of its scripts, and counts its connections."""

    def __init__(self, *answers: bytes, close: bool = False) -> None:
        self.answers = list(answers)
        self.close = close
        self.connections = self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self.answers.pop(0))
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has had enough
        writer.close()
        self.ended += 1


@asynccontextmanager
async def asking(engine: Engine, read_timeout: float = 5.0) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    client = EngineClient(5.0, read_timeout)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base"

    async def ask() -> bytes:
        answer = await client.request(url, "GET", "/x", [("a", "b")])
        try:
            return b"%d " % answer.status + await answer.read()
        finally:
            answer.close()

    try:
        yield ask
    finally:
        await client.close()
        server.close()
        await eventually(lambda: engine.ended == engine.connections, what="closed connections")


async def test_connections_to_an_engine_are_used_again_where_that_is_allowed() -> None:
    last = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 1\r\n\r\n!"
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK
    engine = Engine(OK, chunked, interim, last, OK)
    async with asking(engine) as ask:
        answers = [await ask() for _ in range(5)]
    assert answers == [b"200 ok", b"200 abc", b"200 ok", b"404 !", b"200 ok"]
    assert engine.connections == 2


async def test_an_answer_may_end_with_its_connection() -> None:
    async with asking(Engine(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True)) as ask:
        assert await ask() == b"200 all of it"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", NoAnswer),
        (b"rubbish\r\n\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", BrokenOff),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", BrokenOff),
    ],
)
async def test_what_an_engine_leaves_undone(answer: bytes, error: type[Exception]) -> None:
    async with asking(Engine(answer, close=True)) as ask:
        with pytest.raises(error):
            await ask()


async def test_an_engine_that_is_silent_or_not_there() -> None:
    async with asking(Engine(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"), 0.1) as ask:
        with pytest.raises(TimeoutError):
            await ask()
    with pytest.raises(CannotConnect):
        await EngineClient(5.0, 5.0).request(f"http://127.0.0.1:{free_port()}", "GET", "/", ())
