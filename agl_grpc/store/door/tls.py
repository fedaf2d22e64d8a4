"""TLS of the doors: certificates from files, and clients that have to show one."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agl_grpc.store.door.server import StartError


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format.

    Attributes:
        certificate: The server's certificate, and the intermediate ones that lead to its issuer.
        key: Its private key, without a password.
        client_roots: Issuers of clients' certificates; when set, whoever has none of theirs is turned away.
    """

    certificate: Path
    key: Path
    client_roots: Path | None = None

    @classmethod
    def of(cls, certificate: Path | None, key: Path | None, client_roots: Path | None) -> TlsFiles | None:
        """The files that were named; None = no TLS.

        Raises:
            StartError: A certificate without a key, or the other way round.
        """
        if certificate is None and key is None and client_roots is None:
            return None
        if certificate is None or key is None:
            missing = "--tls-cert" if certificate is None else "--tls-key"
            raise StartError(f"TLS needs a certificate and its key: {missing} is missing")
        return cls(certificate, key, client_roots)

    def context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """What a listening socket needs.

        Args:
            protocols: What is spoken inside, most wanted first: `h2`, `http/1.1`.

        Raises:
            StartError: A file cannot be used; one line says which and why.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(list(protocols))
        for path in (self.certificate, self.key, self.client_roots):
            if path is not None:
                _require(path)
        try:
            # The empty password: a locked key must not make a server ask at its terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise StartError(
                f"certificate {self.certificate} with key {self.key} cannot be used: {_line(error)}; "
                "both must be PEM, belong together, and the key must have no password"
            ) from error
        if self.client_roots is not None:
            try:
                context.load_verify_locations(self.client_roots)
            except ssl.SSLError as error:
                raise StartError(
                    f"{self.client_roots} holds no certificates in PEM format: {_line(error)}"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _require(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror or error}") from error


def _line(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).lower().replace("_", " ")
