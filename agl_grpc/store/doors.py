"""All doors of one server, opened and closed together: gRPC, HTTP, OpenTelemetry's own ports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from google.protobuf.descriptor import ServiceDescriptor

from agl_grpc.store.door.call import Authenticator
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.door.server import GrpcDoor, StartError
from agl_grpc.store.door.service import Parser
from agl_grpc.store.door.tls import RenewedTls, TlsFiles
from agl_grpc.store.http.app import HttpApp
from agl_grpc.store.http.door import HttpDoor
from agl_grpc.store.http.legacy import legacy_routes
from agl_grpc.store.http.otlp import otlp_routes
from agl_grpc.store.http.rest.api import rest_routes

OTLP_GRPC_PORT = 4317
"""Where OpenTelemetry's exporters send by gRPC unless told otherwise."""

OTLP_HTTP_PORT = 4318
"""Where OpenTelemetry's exporters send by HTTP unless told otherwise."""


class Doors:
    """The ports of a server.

    Attributes:
        port: Of the gRPC door.
        http_port: Of the HTTP door; None = there is none.
    """

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Sequence[object]],
        authenticator: Authenticator,
        parsers: Mapping[str, Parser],
        grace: float,
        cors_origins: Sequence[str] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self.port = 0
        self.http_port: int | None = None
        self._grace = grace
        self._tls = None if tls is None else RenewedTls(tls)
        self._renewal: asyncio.Task[None] | None = None
        grpc_tls = None if self._tls is None else self._tls.context(["h2"])
        http_tls = None if self._tls is None else self._tls.context(["http/1.1"])
        self._grpc = GrpcDoor(services, authenticator, parsers, grpc_tls)
        self.draining = self._grpc.draining
        """Set as soon as the server is on its way out."""
        methods = Methods(services, authenticator, parsers, self.draining)
        routes = (rest_routes(methods), otlp_routes(methods), legacy_routes(methods))
        self._http = HttpDoor(HttpApp(routes, cors_origins), grace, http_tls)

    async def open(self, host: str, port: int, http_port: int | None, *, otlp: bool = False) -> None:
        """Binds every port, then serves.

        Args:
            host: Address of all doors.
            port: Of gRPC; 0 = any free one.
            http_port: Of HTTP; 0 = any free one, None = none.
            otlp: Whether to serve OpenTelemetry's own ports too.

        Raises:
            StartError: A port cannot be bound; none is served then.
        """
        elsewhere = "another --host, or leave --otlp out"
        try:
            self.port = self._grpc.bind(host, port)
            if http_port is not None:
                self.http_port = self._http.bind(host, http_port)
            if otlp:
                self._grpc.bind(host, OTLP_GRPC_PORT, elsewhere)
                self._http.bind(host, OTLP_HTTP_PORT, elsewhere)
        except StartError:
            await self.close()
            raise
        await self._grpc.serve()
        if http_port is not None or otlp:
            await self._http.start()
        if self._tls is not None:
            self._renewal = asyncio.create_task(self._tls.follow())

    async def close(self) -> None:
        """Drains: new calls are refused, those under way have the grace."""
        self.draining.set()
        if self._renewal is not None:
            self._renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewal
        await self._http.stop()
        await self._grpc.stop(self._grace)
