"""Nonsense of every kind, for every method and for the port; `make reliability NAME=fuzz` does more."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from agl_grpc.store.errors import invalid_field
from agl_grpc.store.handlers.runs import RunHandlers
from agl_grpc.store.ids import mint
from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2
from tests.chaos.fuzz import fuzzer, garbage
from tests.store.rig import running

SERVICES = [
    service
    for module in (store_service_pb2, runner_service_pb2, trainer_service_pb2, trace_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = {method.name for service in SERVICES for method in service.methods}


def chosen_seed() -> int:
    """From AGL_TEST_SEED, else a new one; printed."""
    seed = int(os.environ.get("AGL_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"AGL_TEST_SEED={seed}")
    return seed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.e2e)])
async def test_no_input_breaks_a_method_or_writes_when_it_is_refused(count: int) -> None:
    async with fuzzer(chosen_seed()) as one:
        result = await one.run(count)
    assert result.defects == []
    assert result.counts.keys() == METHODS
    assert all(sum(outcomes.values()) >= count for outcomes in result.counts.values())
    assert result.grown_bytes < 100 << 20
    # Inputs that are all refused at the door would prove little.
    done = {name for name, outcomes in result.counts.items() if outcomes["done"]}
    assert len(done) > len(METHODS) / 2, sorted(done)


async def test_a_refused_input_that_writes_is_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(request: store_service_pb2.CreateRunRequest) -> bool:
        return zlib.crc32(request.SerializeToString(deterministic=True)) % 8 == 0

    def write_and_refuse(self: RunHandlers, request: Any, call: Any) -> Any:
        async def serve() -> bytes:
            if writes(request):
                await self._store.write(
                    lambda tx: tx.execute("INSERT INTO meta VALUES (?, '')", (mint("x"),))
                )
            raise invalid_field("run", "is refused")

        return serve()

    monkeypatch.setattr(RunHandlers, "create_run", write_and_refuse)
    async with fuzzer(chosen_seed()) as one:
        result = await one.run(300)
    assert 0 < len(result.defects) < 100
    for defect in result.defects:
        assert defect.startswith("CreateRun was refused and wrote a row: ")
        sent = bytes.fromhex(defect.rpartition(" ")[2])
        assert writes(store_service_pb2.CreateRunRequest.FromString(sent))


async def test_nonsense_on_the_port_harms_nobody() -> None:
    async with running(None) as rig:
        await garbage(rig.server.address, chosen_seed(), 200)
        await rig.enqueue(rollout_id="after")
        assert await rig.status("after") == "queuing"
