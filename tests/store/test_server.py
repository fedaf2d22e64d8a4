"""The server as a process and as a door: start, refusal to start, kill -9, drain, errors, credentials."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agl_grpc.store import errors
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.door.call import Authenticator, Call
from agl_grpc.store.door.credentials import CredentialSigner, new_key
from agl_grpc.store.door.server import GrpcDoor, StartError
from agl_grpc.v1 import (
    common_pb2,
    error_reason_pb2,
    rollout_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)
from tests.store.span_support import group, reason_of, serving, span
from tests.support.databases import backend_of
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

Request = store_service_pb2.StreamSpansRequest


class Producer:
    """Streams spans of one attempt for ever, across any loss of the server, and remembers what was acked."""

    def __init__(self, address: str, name: str, attempt: tuple[str, str]) -> None:
        self._address = address
        self._name = name
        self._attempt = attempt
        self.sent: dict[int, bytes] = {}
        self.acked = 0
        self.stop = False

    async def run(self) -> None:
        """Produce until told to stop, then until everything is acknowledged."""
        while not (self.stop and self.acked == len(self.sent)):
            try:
                async with grpc.aio.insecure_channel(self._address) as channel:
                    await self._stream(store_service_pb2_grpc.StoreServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                # A write that meets the loss of the connection fails within the client's own core.
                lost = error.code() == grpc.StatusCode.UNAVAILABLE or "from Core" in str(error.details())
                if not lost:
                    raise
                await asyncio.sleep(0.05)

    async def _stream(self, stub: Any) -> None:
        call = stub.StreamSpans(wait_for_ready=True)
        opening = store_service_pb2.SpanStreamOpen(producer_id=self._name, resume=True)
        await call.write(Request(open=opening))
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise await failure_of(call)
        last = answer.opened.last_sequence
        assert last >= self.acked, "a mark went back behind an acknowledgement"
        self.acked = last
        reading = asyncio.create_task(self._read(call))
        try:
            for number in range(last + 1, 10**9):
                if self.stop and number > len(self.sent):
                    break
                # Unacknowledged messages are sent again as they were, new ones are made.
                span_id = self.sent.setdefault(number, os.urandom(8))
                await self._send(call, number, span_id)
                await asyncio.sleep(0)
            await call.done_writing()
            await reading
        except asyncio.InvalidStateError as error:
            raise await failure_of(call) from error
        finally:
            reading.cancel()

    async def _send(self, call: Any, number: int, span_id: bytes) -> None:
        rollout_id, attempt_id = self._attempt
        spans = group("x", span(f"n{number}", span_id))
        spans.rollout_id, spans.attempt_id = rollout_id, attempt_id
        message = store_service_pb2.SpanStreamMessage(sequence=number, groups=[spans])
        await call.write(Request(spans=message))

    async def _read(self, call: Any) -> None:
        while (answer := await call.read()) is not grpc.aio.EOF:
            if answer.HasField("ack"):
                assert not answer.ack.rejected
                self.acked = max(self.acked, answer.ack.sequence)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


async def started(address: str, count: int) -> list[tuple[str, str]]:
    """Rollouts with an attempt each: (rollout, attempt)."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        request = store_service_pb2.StartRolloutRequest(rollout=rollout_pb2.RolloutSpec())
        made = [(await stub.StartRollout(request)).rollout for _ in range(count)]
        return [(one.rollout.rollout_id, one.attempt.attempt_id) for one in made]


async def stored_ids(address: str, rollout_id: str) -> tuple[list[bytes], list[int]]:
    """Span ids and sequence ids of a rollout, as a reader gets them."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        request = store_service_pb2.ListSpansRequest(rollout_id=rollout_id, page_size=10_000)
        spans: list[Any] = []
        while True:
            page = await stub.ListSpans(request)
            spans += page.spans
            if not page.next_page_token:
                return [one.span.span_id for one in spans], [one.sequence_id for one in spans]
            request.page_token = page.next_page_token


async def test_every_acknowledged_span_survives_kill_9_exactly_once(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chance = random.Random(seed)
    with StoreProcess(tmp_path / "store.db") as process:
        attempts = await started(process.address, 4)
        producers = [Producer(process.address, f"p{n}", one) for n, one in enumerate(attempts)]
        running = [asyncio.create_task(producer.run()) for producer in producers]
        for _ in range(3):
            before = [producer.acked for producer in producers]
            await eventually(
                lambda before=before: all(
                    one.acked > acked for one, acked in zip(producers, before, strict=True)
                ),
                within=20,
                what="progress of every producer",
            )
            await asyncio.sleep(chance.random() * 0.2)  # the moment of the kill is what is varied
            process.kill()
            process.start()
        for producer in producers:
            producer.stop = True
        await asyncio.wait_for(asyncio.gather(*running), 30)
        for producer, (rollout_id, _) in zip(producers, attempts, strict=True):
            ids, sequences = await stored_ids(process.address, rollout_id)
            assert producer.acked == len(producer.sent) > 0
            assert ids == list(producer.sent.values())
            assert sequences == list(range(1, len(ids) + 1))
        assert process.stop() == 0


async def test_a_draining_server_acknowledges_what_it_took(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store.db") as process:
        ((rollout_id, attempt_id),) = await started(process.address, 1)
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
            watch = stub.WatchSpans(store_service_pb2.WatchSpansRequest())
            assert (await watch.read()).checkpoint
            call = stub.StreamSpans()
            await call.write(Request(open=store_service_pb2.SpanStreamOpen(producer_id="p")))
            await call.read()
            sent = []
            for number in range(1, 200):
                spans = group("x", span(f"n{number}"))
                spans.rollout_id, spans.attempt_id = rollout_id, attempt_id
                sent.append(spans.spans[0].span_id)
                message = store_service_pb2.SpanStreamMessage(sequence=number, groups=[spans])
                await call.write(Request(spans=message))
            assert process.process is not None
            process.process.send_signal(signal.SIGTERM)
            acked, drained = 0, False
            while (answer := await call.read()) is not grpc.aio.EOF:
                acked = max(acked, answer.ack.sequence)
                if answer.HasField("drain"):
                    drained = True
                    await call.done_writing()
            assert (acked, drained) == (199, True)
            assert await call.code() == grpc.StatusCode.OK
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(watch)
            assert reason_of(caught.value) == "DRAINING"
        assert await asyncio.to_thread(process.process.wait, 10) == 0
        process.start()
        assert (await stored_ids(process.address, rollout_id))[0] == sent


async def read_all(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


def run_server(port: int, database: Path | None) -> subprocess.CompletedProcess[str]:
    """A server that is expected not to start."""
    command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", str(port), "--no-http"]
    command += ["--memory"] if database is None else ["--database", str(database)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store.db") as process:
        same_port = run_server(process.port, None)
        same_database = run_server(0, process.database)
        starting = process.log.read_text()
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database at all" * 1000)
    broken = run_server(0, damaged)
    for answer, words in (
        (same_port, (f"port {process.port}", "in use", "--port")),
        (same_database, (str(process.database), "another store server")),
        (broken, (str(damaged), "no database")),
    ):
        assert answer.returncode == 1
        (line,) = answer.stderr.strip().splitlines()
        assert all(word in line for word in words), line
        assert "Traceback" not in answer.stderr
    assert f"grpc://127.0.0.1:{process.port}" in starting
    assert "[INFO] (Process-" in starting


class Broken:
    """Handlers with defects."""

    async def get_run(self, _request: object, _call: Call) -> bytes:
        """Fails in a way that nobody foresaw."""
        raise RuntimeError("a secret path of the server")

    async def watch_rollouts(self, _request: object, _call: Call) -> Any:
        """Fails in mid-stream."""
        yield store_service_pb2.WatchRolloutsResponse(cursor=1)
        raise RuntimeError("a secret path of the server")

    async def stream_spans(self, stream: Any, _call: Call) -> None:
        """Fails at once."""
        await stream.read()
        raise errors.storage_full(1.25)


async def test_a_defect_is_logged_and_shown_as_internal(caplog: pytest.LogCaptureFixture) -> None:
    service = store_service_pb2.DESCRIPTOR.services_by_name["StoreService"]
    door = GrpcDoor({service: [Broken()]}, Authenticator(CredentialSigner(new_key()), "operator's"), {})
    port = door.bind("127.0.0.1", 0)
    await door.serve()
    token = (("authorization", "Bearer operator's"),)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetRun(store_service_pb2.GetRunRequest(), metadata=token)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert reason_of(caught.value) == "INTERNAL"
            assert "secret" not in str(caught.value.details())
            assert "a secret path" in caplog.text
            watch = stub.WatchRollouts(store_service_pb2.WatchRolloutsRequest(), metadata=token)
            assert (await watch.read()).cursor == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert reason_of(caught.value) == "INTERNAL"
            stream = stub.StreamSpans(metadata=token)
            await stream.write(Request())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert reason_of(caught.value) == "STORAGE_FULL"
            trailers = dict(caught.value.trailing_metadata() or ())
            retry = error_details_pb2.RetryInfo.FromString(trailers[errors.RETRY_TRAILER])
            assert retry.retry_delay.ToMilliseconds() == 1250
            for wrong in ((), (("authorization", "Bearer other"),), (("authorization", "operator's"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetRun(store_service_pb2.GetRunRequest(), metadata=wrong)
                assert reason_of(caught.value) == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListRuns(store_service_pb2.ListRunsRequest(), metadata=token)
            assert reason_of(caught.value) == "METHOD_UNIMPLEMENTED"
        with pytest.raises(StartError, match=f"port {port} on 127.0.0.1 is in use"):
            door.bind("127.0.0.1", port)
    finally:
        await door.stop(0.1)


async def test_health_reflection_and_server_info(database: Path | str | None) -> None:
    async with serving(database) as (server, channel):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "agl_grpc.v1.StoreService", "agl_grpc.v1.TrainerService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in reflection.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in listed.list_services_response.service}
        assert {f"agl_grpc.v1.{name}Service" for name in ("Store", "Runner", "Trainer")} <= names
        stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        info = await stub.GetServerInfo(store_service_pb2.GetServerInfoRequest())
        assert (info.backend, info.contract_version) == (backend_of(database), "v1")
        kept = database is not None
        assert info.durability == (common_pb2.DURABILITY_DISK if kept else common_pb2.DURABILITY_MEMORY)
        assert info.store_id == server.store.database.store_id
        assert info.limits.max_message_bytes == 64 << 20


async def test_a_watch_of_health_ends_with_the_drain(tmp_path: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    server = await StoreServer.start(ServeConfig(port=0, database=tmp_path / "store.db", grace=60.0))
    async with grpc.aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="agl_grpc.v1.StoreService"))
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="x"))
        assert (await watch.read()).status == serving
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        listed = await health.List(getattr(health_pb2, "HealthListRequest")())  # noqa: B009  # no stubs
        assert listed.statuses["agl_grpc.v1.RunnerService"].status == serving
        # Well before the grace is over.
        async with asyncio.timeout(20):
            await server.stop()
        assert (await watch.read()).status == not_serving
        assert [await watch.read(), await unknown.read()] == [grpc.aio.EOF] * 2


def test_credentials_are_signed_and_expire() -> None:
    now = time.time()
    signer = CredentialSigner(new_key(), lambda: now)
    text = signer.mint("r", "ro-1", "at-1", lifetime=60)
    assert signer.verify(text).attempt_id == "at-1"
    body, _, signature = text.rpartition(".")
    other = CredentialSigner(new_key(), lambda: now).mint("r", "ro-1", "at-1", lifetime=60)
    wrong = [other, body, f"{body}.{signature[::-1]}", f"{body}x.{signature}", "agl1..", ""]
    late = CredentialSigner(signer._key, lambda: now + 61)
    for check, given in [(signer, one) for one in wrong] + [(late, text)]:
        with pytest.raises(errors.StoreError) as caught:
            check.verify(given)
        assert caught.value.reason == error_reason_pb2.ERROR_REASON_UNAUTHENTICATED
