"""Each language's client: built as a user builds it, its own tests, the vectors."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
import trustme

from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.door.tls import TlsFiles
from agl_grpc.v1 import common_pb2, rollout_pb2, store_service_pb2_grpc
from agl_grpc.v1 import store_service_pb2 as pb
from tests.clients import readme_examples
from tests.clients.readme_examples import works
from tests.conformance.__main__ import main as conformance
from tests.conformance.languages import CPP, CPP_BUILD, GO, LANGUAGES, Language, run
from tests.conformance.replay import VECTORS
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OTHERS = [name for name in LANGUAGES if name != "python"]


@pytest.fixture(scope="module", params=OTHERS)
def language(request: pytest.FixtureRequest) -> str:
    """A language other than Python, its client built."""
    name: str = request.param
    LANGUAGES[name].make()
    return name


def test_its_own_tests_pass(language: str) -> None:
    folder = LANGUAGES[language].folder
    if language == "go":
        run((GO, "vet", "./..."), folder)
        output = run((GO, "test", "-v", "-count=1", "-timeout", "300s", "."), folder)
        assert len(re.findall("^--- PASS", output, re.M)) >= 17
        assert "--- SKIP" not in output
    elif language == "cpp":
        output = run((CPP, str(CPP_BUILD / "agl_grpc_tests")), folder)
        found = re.search(r"^(\d+) passed, 0 failed$", output, re.M)
        assert found is not None, output
        assert int(found[1]) >= 28
    else:
        output = run(("node", "--test", "--test-reporter", "spec", "dist/test/"), folder)
        assert re.search(r" pass [1-9]\d+\n", output)
        assert " fail 0\n" in output
        assert " skipped 0\n" in output


def test_it_speaks_tls(language: str, tmp_path: Path) -> None:
    issuer = trustme.CA()
    issued = issuer.issue_cert("127.0.0.1")
    roots, chain, key = tmp_path / "roots.pem", tmp_path / "server.pem", tmp_path / "server.key"
    issuer.cert_pem.write_to_path(str(roots))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(chain), append=True)
    issued.private_key_pem.write_to_path(str(key))
    folder = tmp_path / "vectors"
    folder.mkdir()
    for name in ("server_info", "span_stream", "watch"):
        shutil.copy(VECTORS / f"{name}.json", folder)
    asyncio.run(_replayed_over_tls(LANGUAGES[language], TlsFiles(chain, key), folder, roots))


async def _replayed_over_tls(language: Language, files: TlsFiles, folder: Path, roots: Path) -> None:
    server = await StoreServer.start(ServeConfig(port=0, database=None, grace=1.0, tls=files))
    try:
        command = [*language.replay, f"127.0.0.1:{server.port}", str(folder), str(roots)]
        output = await asyncio.to_thread(run, command, language.folder)
        assert output.split("\n")[:-1] == ["ok server_info", "ok span_stream", "ok watch"]
    finally:
        await server.stop()


def test_all_languages_replay_every_vector_and_leave_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance() == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for name in LANGUAGES:
        assert f"stored state and span bytes, {name}: as Python leaves them" in printed
    assert printed.count("ok ") >= len(LANGUAGES) * 24


def test_the_typescript_package_is_installed_and_its_readme_works(tmp_path: Path) -> None:
    LANGUAGES["typescript"].make()
    with StoreProcess(tmp_path / "store.db") as store:
        folder = tmp_path / "user"
        folder.mkdir()
        works(folder, readme_examples.typescript(folder, store.address), store)


def test_the_readme_of_go_works(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store.db") as store:
        works(tmp_path, readme_examples.go(tmp_path, store.address), store)


def test_the_cpp_client_is_installed_and_found_and_its_readme_works(tmp_path: Path) -> None:
    LANGUAGES["cpp"].make()
    with StoreProcess(tmp_path / "store.db") as store:
        commands = readme_examples.cpp(tmp_path, store.address)
        works(tmp_path, commands["agent"], store)
        with grpc.insecure_channel(store.address) as channel:
            _greets(
                tmp_path, commands["greeter"], store.address, store_service_pb2_grpc.StoreServiceStub(channel)
            )


def _greets(
    folder: Path, command: Sequence[str], address: str, stub: store_service_pb2_grpc.StoreServiceStub
) -> None:
    spec = rollout_pb2.RolloutSpec(input=common_pb2.Payload(data=b'"you"'))
    (made,) = stub.EnqueueRollouts(pb.EnqueueRolloutsRequest(run_id="default", rollouts=[spec])).rollouts
    with subprocess.Popen((*command, address, "default"), cwd=folder) as greeter:
        waiting = pb.WaitRolloutsRequest(rollout_ids=[made.rollout_id])
        waiting.timeout.FromSeconds(30)
        (done,) = stub.WaitRollouts(waiting, timeout=60).rollouts
        greeter.terminate()
        assert greeter.wait(30) == 0
    spans = stub.ListSpans(pb.ListSpansRequest(rollout_id=made.rollout_id)).spans
    assert done.status == rollout_pb2.ROLLOUT_STATUS_SUCCEEDED
    assert [stored.span.name for stored in spans] == ["greeting"]
