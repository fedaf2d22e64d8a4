"""TLS at the door: gRPC's own client against certificates of a throw-away issuer."""

from __future__ import annotations

import asyncio
import pickle
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from agl_grpc.client import StoreClient, SyncStoreClient
from agl_grpc.client.channel import Tls, open_channel
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.door.server import StartError
from agl_grpc.store.door.tls import RenewedTls, TlsFiles
from tests.store.http2_peer import echoing


@dataclass
class Issued:
    """Files in PEM format: an issuer, what it made for the server and for a client, and a stranger's."""

    roots: Path
    certificate: Path
    key: Path
    client: Tls
    stranger: Tls


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    place = tmp_path_factory.mktemp("tls")
    issuer, other = trustme.CA(), trustme.CA()
    roots = place / "roots.pem"
    issuer.cert_pem.write_to_path(str(roots))

    def issue(by: trustme.CA, name: str) -> tuple[Path, Path]:
        made = by.issue_cert(name)
        files = place / f"{name}.pem", place / f"{name}.key"
        for part in made.cert_chain_pems:
            part.write_to_path(str(files[0]), append=True)
        made.private_key_pem.write_to_path(str(files[1]))
        return files

    server = issue(issuer, "127.0.0.1")
    return Issued(roots, *server, Tls(roots, *issue(issuer, "worker")), Tls(roots, *issue(other, "stranger")))


async def test_calls_go_through_tls(issued: Issued) -> None:
    context = TlsFiles(issued.certificate, issued.key).context(["h2"])
    async with echoing(tls=context) as (_, _, port):
        async with open_channel(f"grpcs://127.0.0.1:{port}", tls=Tls(issued.roots)) as channel:
            assert await channel.unary_unary("/t/Unary")(b"x" * 3_000_000) == b"x" * 3_000_000
        # Who trusts others, and who speaks without TLS, gets nowhere.
        for wrong in (f"grpcs://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            async with open_channel(wrong) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary("/t/Unary")(b"x", timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_clients_may_have_to_show_a_certificate(issued: Issued) -> None:
    context = TlsFiles(issued.certificate, issued.key, issued.roots).context(["h2"])
    async with echoing(tls=context) as (_, _, port):
        target = f"grpcs://127.0.0.1:{port}"
        async with open_channel(target, tls=issued.client) as channel:
            assert await channel.unary_unary("/t/Unary")(b"x") == b"x"
        for stranger in (Tls(issued.roots), issued.stranger):
            async with open_channel(target, tls=stranger) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary("/t/Unary")(b"x", timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_store_with_tls_serves_grpc_and_http(issued: Issued) -> None:
    files = TlsFiles(issued.certificate, issued.key)
    server = await StoreServer.start(ServeConfig(port=0, http_port=0, database=None, tls=files))
    try:
        assert f"grpcs://127.0.0.1:{server.port}" in server.describe()
        target = f"grpcs://127.0.0.1:{server.port}"
        async with StoreClient(target, root_certificates=issued.roots) as client:
            made = await client.enqueue_rollout({"a": 1})
            copy: StoreClient = pickle.loads(pickle.dumps(client))
            async with copy:
                assert (await copy.get_rollout_by_id(made.rollout_id)) is not None
        sync = SyncStoreClient(target, root_certificates=str(issued.roots))
        assert len(await asyncio.to_thread(sync.query_rollouts)) == 1
        await asyncio.to_thread(sync.close)
        trusted = ssl.create_default_context(cafile=str(issued.roots))
        async with httpx.AsyncClient(verify=trusted) as web:
            assert (await web.get(f"{server.url}/agl/v1/health")).status_code == 200
    finally:
        await server.stop()


def _issue(by: trustme.CA, name: str, certificate: Path, key: Path) -> None:
    """Writes a certificate and its key, the certificate first, over what stands there."""
    made = by.issue_cert(name)
    certificate.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
    made.private_key_pem.write_to_path(str(key))


async def _reach(target: str, tls: Tls) -> grpc.StatusCode:
    """How a call over a new connection ends."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with open_channel(target, tls=tls, options=options) as channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
        except grpc.aio.AioRpcError as refused:
            return refused.code()
        return grpc.StatusCode.OK


async def test_a_renewed_certificate_is_taken_up_under_way(tmp_path: Path) -> None:
    before, after = trustme.CA(), trustme.CA()
    served, key, issuers = tmp_path / "served.pem", tmp_path / "served.key", tmp_path / "issuers.pem"
    clients = {}
    for name, issuer in (("before", before), ("after", after)):
        roots, mine, mine_key = (tmp_path / f"{name}.{part}" for part in ("roots", "pem", "key"))
        issuer.cert_pem.write_to_path(str(roots))
        _issue(issuer, "worker", mine, mine_key)
        clients[name] = Tls(roots, mine, mine_key)
    _issue(before, "127.0.0.1", served, key)
    before.cert_pem.write_to_path(str(issuers))
    files = TlsFiles(served, key, issuers)
    server = await StoreServer.start(ServeConfig(port=0, http_port=0, database=None, tls=files))
    try:
        target = f"grpcs://127.0.0.1:{server.port}"
        old = clients["before"]
        async with StoreClient(
            target, root_certificates=old.root_certificates, certificate=old.certificate, key=old.key
        ) as client:
            await client.enqueue_rollout({"a": 1})
            assert await _reach(target, clients["after"]) is grpc.StatusCode.UNAVAILABLE
            # Half of a renewal: the key is another's, so all stays as it was.
            key.write_text("no key")
            assert await _reach(target, old) is grpc.StatusCode.OK
            after.cert_pem.write_to_path(str(issuers))
            _issue(after, "127.0.0.1", served, key)
            async with asyncio.timeout(60):
                while await _reach(target, clients["after"]) is not grpc.StatusCode.OK:
                    pass
            assert await _reach(target, old) is grpc.StatusCode.UNAVAILABLE
            # Whoever was connected goes on.
            assert len(await client.query_rollouts()) == 1
        new = clients["after"]
        trusted = ssl.create_default_context(cafile=str(new.root_certificates))
        trusted.load_cert_chain(str(new.certificate), str(new.key))
        async with httpx.AsyncClient(verify=trusted) as web:
            assert (await web.get(f"{server.url}/agl/v1/health")).status_code == 200
    finally:
        await server.stop()


def test_files_that_cannot_be_used_change_nothing_while_serving(
    issued: Issued, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, key = tmp_path / "served.pem", tmp_path / "served.key"
    served.write_bytes(issued.certificate.read_bytes())
    key.write_bytes(issued.key.read_bytes())
    tls = RenewedTls(TlsFiles(served, key))
    tls.context(["h2"])
    assert not tls.look()
    served.unlink()
    assert not tls.look()
    assert not tls.look()
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(
        f"the certificate is not renewed, the old one stays in use: {served} cannot be read"
    )
    served.write_bytes(issued.certificate.read_bytes())
    assert tls.look()
    assert not tls.look()


def test_files_that_cannot_be_used_are_named(issued: Issued, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    assert TlsFiles.of(None, None, None) is None
    with pytest.raises(StartError, match="--tls-key is missing"):
        TlsFiles.of(issued.certificate, None, None)
    with pytest.raises(StartError, match="--tls-cert is missing"):
        TlsFiles.of(None, issued.key, None)
    for files, said in (
        (TlsFiles(missing, issued.key), "missing.pem cannot be read: No such file"),
        (TlsFiles(rubbish, issued.key), "rubbish.pem with key .* cannot be used"),
        (TlsFiles(issued.certificate, issued.client.key or missing), "key values mismatch"),
        (TlsFiles(issued.certificate, issued.key, rubbish), "rubbish.pem holds no certificates"),
    ):
        with pytest.raises(StartError, match=said):
            files.context(["h2"])
