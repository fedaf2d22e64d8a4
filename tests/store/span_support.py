"""What tests of spans share: a server in this process, attempts to write to, spans to write."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.store import limits
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import (
    model_call_pb2,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)

if TYPE_CHECKING:
    Stub = store_service_pb2_grpc.StoreServiceAsyncStub


@asynccontextmanager
async def serving(
    database: Path | str | None = None, span_queue_bytes: int = limits.QUEUE_BYTES
) -> AsyncIterator[tuple[StoreServer, grpc.aio.Channel]]:
    """A server on a random port and a channel to it."""
    server = await StoreServer.start(
        ServeConfig(port=0, database=database, grace=2.0, span_queue_bytes=span_queue_bytes)
    )
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, channel
    finally:
        await server.stop()


async def make_attempts(server: StoreServer, *ids: str) -> None:
    """Running attempts without leases: `ro-x` with `at-x` for each id x."""

    def run(tx: Tx) -> None:
        (run_key,) = tx.execute("SELECT run_key FROM runs WHERE run_id = 'default'").fetchone()
        for name in ids:
            rollout_key, attempt_key = tx.counters.take("rollouts"), tx.counters.take("attempts")
            tx.execute(
                "INSERT INTO rollouts (rollout_key, rollout_id, run_key, queue_key, status, create_time, "
                "max_attempts, max_redeliveries, backoff) VALUES (?, ?, ?, 1, 3, ?, 1, 3, 1)",
                (rollout_key, f"ro-{name}", run_key, tx.now),
            )
            tx.execute("INSERT INTO rollout_bodies VALUES (?, ?)", (rollout_key, b""))
            tx.execute(
                "INSERT INTO attempts (attempt_key, attempt_id, rollout_key, run_key, sequence_id, status, "
                "start_time) VALUES (?, ?, ?, ?, 1, 2, ?)",
                (attempt_key, f"at-{name}", rollout_key, run_key, tx.now),
            )
            tx.execute(
                "UPDATE rollouts SET latest_attempt_key = ?, attempt_count = 1 WHERE rollout_key = ?",
                (attempt_key, rollout_key),
            )

    await server.store.write(run)


def span(name: str = "step", span_id: bytes | None = None, **fields: object) -> span_pb2.Span:
    """A span that begins now."""
    now = time.time_ns()
    made = span_pb2.Span(
        span_id=span_id or os.urandom(8), name=name, start_time_unix_nano=now, end_time_unix_nano=now + 5
    )
    made.MergeFrom(span_pb2.Span(**fields))  # type: ignore[arg-type] # any fields of a span
    return made


def call_span(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    base: bytes = b"",
    base_length: int = 0,
    span_id: bytes | None = None,
) -> span_pb2.Span:
    """A span with a model call of one choice."""
    call = model_call_pb2.ModelCall(
        model="tiny",
        prompt=model_call_pb2.PromptTokens(token_ids=prompt, base_span_id=base, base_length=base_length),
    )
    choice = call.choices.add(token_ids=response, logprobs=[-0.25] * len(response), finish_reason="stop")
    choice.policy_runs.add(start=0, end=len(response), policy_version=7)
    return span("chat", span_id, model_call=call)


def group(name: str, *spans: span_pb2.Span) -> span_pb2.AttemptSpans:
    """Spans of attempt `at-<name>`."""
    return span_pb2.AttemptSpans(rollout_id=f"ro-{name}", attempt_id=f"at-{name}", spans=spans)


async def append(stub: Stub, *groups: span_pb2.AttemptSpans) -> store_service_pb2.AppendSpansResponse:
    """AppendSpans with sequence ids."""
    return await stub.AppendSpans(
        store_service_pb2.AppendSpansRequest(groups=groups, return_sequence_ids=True)
    )


async def listed(stub: Stub, name: str, **fields: object) -> list[span_pb2.StoredSpan]:
    """All spans of rollout `ro-<name>` that match."""
    request = store_service_pb2.ListSpansRequest(rollout_id=f"ro-{name}", **fields)  # type: ignore[arg-type] # any fields
    found: list[span_pb2.StoredSpan] = []
    while True:
        page = await stub.ListSpans(request)
        found += page.spans
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason of an error, which must have exactly one ErrorInfo of our domain."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert [detail.Unpack(info) for detail in status.details].count(True) == 1
    assert info.domain == "agl-grpc"
    return str(info.reason)
