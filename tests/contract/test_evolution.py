"""The contract goes on: nothing that was promised breaks, and what was released works with today's server."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import rollout_pb2

ROOT = Path(__file__).parents[2]
RELEASE = Path(__file__).parent / "release"
BUF = ROOT / ".venv-proto" / "typing" / "bin" / "buf"


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    started = await StoreServer.start(ServeConfig(port=0, database=None, grace=1.0))
    yield started
    await started.stop()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the release's client, its vectors, and the session that it is to hold."""
    folder = tmp_path_factory.mktemp("released")
    with zipfile.ZipFile(RELEASE / "client.zip") as kept:
        kept.extractall(folder)
    (folder / "session.py").write_text(Path(__file__).with_name("released_session.py").read_text())
    return folder


def _of_the_release(released: Path, *command: str) -> str:
    """What Python prints with the release's modules in place of today's."""
    environment = {**os.environ, "PYTHONPATH": str(released)}
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=released, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_the_released_client_replays_its_vectors(released: Path, server: StoreServer) -> None:
    code = "import agl_grpc.client as c, agl_grpc.v1.span_pb2 as s; print(c.__file__, s.__file__)"
    for found in (await asyncio.to_thread(_of_the_release, released, "-c", code)).split():
        assert Path(found).is_relative_to(released)
    replay = ("-m", "tests.conformance.replay", server.address)
    printed = await asyncio.to_thread(_of_the_release, released, *replay)
    names = sorted(path.stem for path in (released / "tests" / "vectors").glob("*.json"))
    assert printed.split("\n")[:-1] == [f"ok {name}" for name in names]
    assert len(names) >= 20


async def test_the_released_client_does_its_work(released: Path, server: StoreServer) -> None:
    await asyncio.to_thread(_of_the_release, released, "session.py", server.address)


def _breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BUF), "breaking", "--against", str(RELEASE / "contract.binpb")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_contract_breaks_nothing_that_was_released() -> None:
    done = _breaking(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("rollout", r"string rollout_id = 1;", "string rollout_id = 101;", "rollout_id"),
        ("rollout", r"string rollout_id = 1;", "bytes rollout_id = 1;", "changed type"),
        ("store_service", r"rpc GetRollout\(", "rpc ReadRollout(", "GetRollout"),
        ("error_reason", r"ERROR_REASON_LEASE_LOST", "ERROR_REASON_LEASE_OVER", "ERROR_REASON_LEASE_LOST"),
    ],
    ids=["renumbered", "retyped", "renamed", "another-reason"],
)
def test_what_breaks_the_contract_is_found(
    tmp_path: Path, file: str, old: str, new: str, complaint: str
) -> None:
    (tmp_path / "buf.yaml").write_bytes((ROOT / "buf.yaml").read_bytes())
    place = tmp_path / "proto" / "agl_grpc" / "v1"
    place.mkdir(parents=True)
    for path in (ROOT / "proto" / "agl_grpc" / "v1").glob("*.proto"):
        text = path.read_text()
        (place / path.name).write_text(re.sub(old, new, text, count=1) if path.stem == file else text)
    done = _breaking(tmp_path)
    assert done.returncode != 0
    assert complaint in done.stdout


def test_fields_of_a_newer_contract_survive_a_round_trip() -> None:
    wire = b"\x0a\x01a\xfa\x3e\x02hi"  # rollout_id "a", and "hi" in field 1007
    rollout = rollout_pb2.Rollout.FromString(wire)
    assert rollout.rollout_id == "a"
    assert rollout.SerializeToString() == wire
