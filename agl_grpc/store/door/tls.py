"""TLS of the doors: certificates from files, and clients that have to show one."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agl_grpc.store.door.server import StartError

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


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


class RenewedTls:
    """TLS whose certificates follow their files: connections that begin after a renewal get the new ones.

    Connections that are there already go on as they began.

    Args:
        files: Where certificate, key and issuers stand.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamps()
        self._complaint = ""
        self._newest: dict[tuple[str, ...], ssl.SSLContext] = {}

    def context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """What a listening socket needs, once and for all; see `TlsFiles.context`.

        Raises:
            StartError: A file cannot be used; one line says which and why.
        """
        spoken = tuple(protocols)
        first = self._newest[spoken] = self._files.context(spoken)

        def choose(connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
            # With the context the issuers of clients change too: whoever is no longer named is turned away.
            connection.context = self._newest[spoken]

        first.sni_callback = choose
        return first

    def look(self) -> bool:
        """Reads the files again if they have changed; what cannot be used is reported and changes nothing.

        Returns:
            Whether new certificates are in use from now on.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        try:
            renewed = {spoken: self._files.context(spoken) for spoken in self._newest}
        except (StartError, OSError) as error:
            # Certificate and key are seldom written at one moment: the next look may find both.
            if str(error) != self._complaint:
                log.warning("the certificate is not renewed, the old one stays in use: %s", error)
            self._complaint = str(error)
            return False
        self._newest, self._seen, self._complaint = renewed, stamps, ""
        log.info("the certificate of %s is renewed", self._files.certificate)
        return True

    async def follow(self) -> None:
        """Looks each second, until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        files = self._files
        return tuple(_stamp(path) for path in (files.certificate, files.key, files.client_roots))


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What changes with a file's content, or with the file that a link names; None = it is not there."""
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _require(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror or error}") from error


def _line(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).lower().replace("_", " ")
