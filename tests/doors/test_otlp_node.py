"""OTLP: spans of the stock OpenTelemetry SDK for Node.js."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from agl_grpc.store.door.app import StoreServer
from tests.doors.test_otlp import begin, stored
from tests.support.environments import REPOSITORY

pytestmark = pytest.mark.e2e
FOLDER = REPOSITORY / "tests/doors/node"


async def test_the_exporters_for_node_deliver(memory: StoreServer) -> None:
    assert (FOLDER / "node_modules").exists(), f"no packages in {FOLDER}: run `make peers`"
    attempt = (await begin(memory)).rollout.attempt
    command = ["node", "emit.mjs", memory.address, memory.url, attempt.rollout_id, attempt.attempt_id]
    answer = await asyncio.to_thread(
        subprocess.run, command, cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    spans = [one.span for one in await stored(memory, attempt.rollout_id)]
    by_name = {span.name: span for span in spans}
    kinds = ("grpc", "proto", "json")
    assert set(by_name) == {f"{kind} {place}" for kind in kinds for place in ("inner", "outer")}
    for kind in kinds:
        inner, outer = by_name[f"{kind} inner"], by_name[f"{kind} outer"]
        assert inner.parent_span_id == outer.span_id
        assert inner.trace_id == outer.trace_id
        assert outer.status.message == "sad"
        assert outer.scope_name == "node-test"
        assert {one.key for one in inner.attributes} == {"texts"}
