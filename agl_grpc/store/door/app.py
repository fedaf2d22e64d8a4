"""One store server: the store, its handlers and its doors, put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor

from agl_grpc.store import limits
from agl_grpc.store.clock import Clock
from agl_grpc.store.door.call import Authenticator
from agl_grpc.store.door.credentials import CredentialSigner, new_key
from agl_grpc.store.door.server import StartError
from agl_grpc.store.door.service import Parser
from agl_grpc.store.door.tls import TlsFiles
from agl_grpc.store.doors import OTLP_GRPC_PORT, OTLP_HTTP_PORT, Doors
from agl_grpc.store.handlers import handlers
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.spans.evict import EvictionLimits
from agl_grpc.store.storage.engine import DatabaseError
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """How a store server runs."""

    host: str = "127.0.0.1"
    """Address of the gRPC door."""
    port: int = 4747
    """Port of the gRPC door; 0 = any free one."""
    http_port: int | None = None
    """Port of the HTTP door (REST, OTLP/HTTP); 0 = any free one, None = no such door."""
    otlp: bool = False
    """Whether to listen on OpenTelemetry's own ports too: 4317 (gRPC) and 4318 (HTTP)."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the HTTP door; `*` = all."""
    tls: TlsFiles | None = None
    """Certificate and key of all doors; None = no TLS."""
    database: Path | str | None = Path("agl-grpc.db")
    """The SQLite file, or `postgresql://user@host/name`; None = a throw-away file that is gone at the end
    (`--memory`)."""
    operator_token: str | None = None
    """When set, every caller needs it, or an attempt credential; None = local callers are trusted."""
    grace: float = 10.0
    """Seconds that calls under way may take while draining."""
    log_level: str = "INFO"
    """Lowest level of log lines that are shown."""
    limit_pages: int = 0
    """Largest size of the database in pages of 8 KiB; 0 = the disk's."""
    evict_above: int | None = None
    """With a throw-away database: bytes of spans above which old ones are evicted; None = 70 % of memory."""
    evict_to: int | None = None
    """Eviction goes on until there are no more bytes of spans than this; None = 80 % of `evict_above`."""
    span_queue_bytes: int = limits.QUEUE_BYTES
    """Most bytes of spans that wait for the disk; beyond it calls are refused and streams held back (R28)."""


@dataclass(frozen=True)
class Opened:
    """An open store with what serves it, before anybody can reach it.

    Attributes:
        store: The store.
        services: Handler objects of each service.
        parsers: What replaces generated request types, by method name.
        authenticator: Says who calls.
    """

    store: Store
    services: Mapping[ServiceDescriptor, Sequence[object]]
    parsers: Mapping[str, Parser]
    authenticator: Authenticator

    @classmethod
    async def by(cls, config: ServeConfig, clock: Clock | None = None) -> Opened:
        """Opens the database and makes the handlers.

        Raises:
            StartError: The database cannot be used; one line says why and what to do.
        """
        try:
            store = await Store.open(config.database, clock=clock, limit_pages=config.limit_pages)
        except DatabaseError as error:
            raise StartError(str(error)) from error
        try:
            signer = CredentialSigner(await store.write(_signing_key))
            side = await WriteSide.start(store, signer)
            eviction = None
            if store.database.backend == "memory":
                eviction = _eviction(config)
            services, parsers = handlers(side, config.span_queue_bytes, eviction)
        except BaseException:
            await store.close()
            raise
        return cls(store, services, parsers, Authenticator(signer, config.operator_token))


class StoreServer:
    """A running store server. Make it with `StoreServer.start`, on the event loop that serves.

    Attributes:
        store: The store.
        port: Port of the gRPC door.
        http_port: Port of the HTTP door; None = there is none.
    """

    def __init__(self, config: ServeConfig, store: Store, doors: Doors) -> None:
        self.config = config
        self.store = store
        self.port = doors.port
        self.http_port = doors.http_port
        self._doors = doors

    @classmethod
    async def start(cls, config: ServeConfig, clock: Clock | None = None) -> StoreServer:
        """Opens the database and the doors.

        Raises:
            StartError: The database or a port cannot be used; one line says why and what to do.
        """
        opened = await Opened.by(config, clock)
        try:
            doors = Doors(
                opened.services,
                opened.authenticator,
                opened.parsers,
                config.grace,
                config.cors_origins,
                config.tls,
            )
            await doors.open(config.host, config.port, config.http_port, otlp=config.otlp)
        except BaseException:
            await opened.store.close()
            raise
        return cls(config, opened.store, doors)

    @property
    def address(self) -> str:
        """`host:port` of the gRPC door."""
        return f"{self._host}:{self.port}"

    @property
    def url(self) -> str:
        """`http://host:port` of the HTTP door (`https` with TLS); empty = there is none."""
        return "" if self.http_port is None else f"http{self._secure}://{self._host}:{self.http_port}"

    @property
    def _secure(self) -> str:
        return "" if self.config.tls is None else "s"

    @property
    def _host(self) -> str:
        return f"[{self.config.host}]" if ":" in self.config.host else self.config.host

    def describe(self) -> str:
        """One line that names every door and the database."""
        http = f"{self.url} (REST, OTLP, legacy)" if self.url else "HTTP off"
        otlp = "OTLP off"
        if self.config.otlp:
            otlp = f"OTLP also on {self._host}:{OTLP_GRPC_PORT} (gRPC) and :{OTLP_HTTP_PORT} (HTTP)"
        services = "store, runner, trainer, OTLP, health, reflection"
        return (
            f"Starting server at grpc{self._secure}://{self.address} ({services}); {http}; {otlp}; "
            f"{self.store.database.describe()}; process {os.getpid()}"
        )

    async def stop(self) -> None:
        """Drains: NOT_SERVING, polls and streams end politely, what was accepted is on disk."""
        # Waits end first: calls that wait for an event would else use up the whole grace.
        self._doors.draining.set()
        self.store.hub.close()
        await self._doors.close()
        await self.store.close()


def _eviction(config: ServeConfig) -> EvictionLimits:
    try:
        return EvictionLimits.choose(config.evict_above, config.evict_to)
    except ValueError as error:
        raise StartError(f"{error}; the first must be positive and the second no larger") from error


def _signing_key(tx: Tx) -> bytes:
    tx.execute("INSERT INTO meta VALUES ('credential_key', ?) ON CONFLICT DO NOTHING", (new_key().hex(),))
    (key,) = tx.execute("SELECT value FROM meta WHERE name = 'credential_key'").fetchone()
    return bytes.fromhex(key)
