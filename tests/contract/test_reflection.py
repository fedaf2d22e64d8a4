"""The commands that README.md and docs/contract.md show for `buf curl` and `grpcurl`, against a real server.

`buf curl` runs as it is written. `grpcurl` is not installed here: what it is given is looked up by
reflection, as it does, and called.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from agl_grpc.store.door.app import ServeConfig, StoreServer
from tests.contract.test_evolution import BUF, ROOT

PAGES = ("README.md", "docs/contract.md")


def _commands(program: str) -> list[str]:
    pattern = rf"^{program} .*$"
    lines = [line for page in PAGES for line in re.findall(pattern, (ROOT / page).read_text(), re.M)]
    return sorted(set(lines))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[StoreServer]:
    started = await StoreServer.start(ServeConfig(port=0, database=None, grace=1.0))
    yield started
    await started.stop()


@pytest.mark.parametrize("line", _commands("buf curl"))
async def test_buf_curl_works_as_it_is_shown(server: StoreServer, line: str) -> None:
    words = shlex.split(line.replace("127.0.0.1:4747", server.address))
    done = await asyncio.to_thread(
        subprocess.run, [str(BUF), *words[1:]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if "--list-methods" in words:
        assert "agl_grpc.v1.TrainerService/ClaimBatch" in done.stdout.splitlines()
    else:
        assert json.loads(done.stdout)["contractVersion"] == "v1"


@pytest.mark.parametrize("line", _commands("grpcurl"))
async def test_what_grpcurl_is_given_is_found_by_reflection(server: StoreServer, line: str) -> None:
    answer = await asyncio.to_thread(_by_reflection, server.address, shlex.split(line))
    if line.endswith(" list"):
        assert {f"agl_grpc.v1.{name}Service" for name in ("Store", "Runner", "Trainer")} <= set(answer)
    elif "Enqueue" in line:
        assert answer["rollouts"][0]["status"] == "ROLLOUT_STATUS_QUEUING"
    else:
        assert answer == "NOT_FOUND"


def _by_reflection(target: str, words: list[str]) -> Any:
    """Lists the services, or calls the rpc that is the last word with the message after ``-d``."""
    with grpc.insecure_channel(target) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        if words[-1] == "list":
            return list(found.get_services())
        pool = descriptor_pool.DescriptorPool(found)
        service, _, name = words[-1].partition("/")
        method = pool.FindServiceByName(service).methods_by_name[name]
        request, response = (
            message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)
        )
        call = channel.unary_unary(
            f"/{words[-1]}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            message = json_format.Parse(words[words.index("-d") + 1], request())
            return json_format.MessageToDict(call(message, timeout=20))
        except grpc.RpcError as error:
            return error.code().name  # type: ignore[attr-defined]  # a call that failed has one
