"""The vectors with the Python client, on every back end that the suite runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2
from tests.conformance.replay import VECTORS, Mismatch, replay, vectors


@pytest.fixture
async def server(database: Path | str | None) -> AsyncIterator[StoreServer]:
    started = await StoreServer.start(ServeConfig(port=0, database=database, grace=1.0))
    yield started
    await started.stop()


@pytest.mark.parametrize("path", vectors(), ids=lambda path: path.stem)
async def test_a_store_answers_as_the_vector_says(server: StoreServer, path: Path) -> None:
    await asyncio.to_thread(_replay, server.address, path)


def _replay(target: str, path: Path) -> None:
    with grpc.insecure_channel(target) as channel:
        replay(path, channel)


@pytest.mark.parametrize(
    ("receive", "complaint"),
    [
        ('[{"contractVersion": "v2"}]', "contractVersion is 'v1', not 'v2'"),
        ('[{"contractVersion": null}]', "should not be set"),
        ('[{"noSuch": "*"}]', "noSuch is not set"),
        ("[]", "has 1 elements, not 0"),
    ],
)
async def test_a_vector_that_does_not_hold_is_named(
    server: StoreServer, tmp_path: Path, receive: str, complaint: str
) -> None:
    path = tmp_path / "wrong.json"
    step = '{"rpc": "StoreService/GetServerInfo", "send": [{}], "receive": ' + receive + "}"
    path.write_text('{"title": "wrong", "steps": [' + step + "]}")
    with pytest.raises(Mismatch, match=complaint):
        await asyncio.to_thread(_replay, server.address, path)


def test_every_rpc_has_a_vector() -> None:
    text = "".join(path.read_text() for path in vectors(VECTORS))
    missing = {
        f"{service.name}/{method.name}"
        for module in (store_service_pb2, runner_service_pb2, trainer_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if f'"{service.name}/{method.name}"' not in text
    }
    assert not missing
