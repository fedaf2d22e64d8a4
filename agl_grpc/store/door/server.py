"""The gRPC door: binding, settings, health, reflection, graceful drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agl_grpc.store import limits
from agl_grpc.store.door.call import Authenticator
from agl_grpc.store.door.service import Parser, ServiceBinder

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = limits.MESSAGE_BYTES
"""Largest message in either direction."""

_OPTIONS = (
    # Without this a second server binds the same port and traffic splits silently between the two.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ping each 30 s; the default of five minutes would answer them with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class StartError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""


class GrpcDoor:
    """One gRPC port that serves the contract's services, health and reflection.

    Args:
        services: handler objects of each service; see `agl_grpc.store.door.service`.
        authenticator: says who calls.
        parsers: views that replace generated request types, by method name.
    """

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Sequence[object]],
        authenticator: Authenticator,
        parsers: Mapping[str, Parser],
    ) -> None:
        self.draining = asyncio.Event()
        """Set as soon as the server is on its way out."""
        self._services = services
        self._binder = ServiceBinder(authenticator, self.draining, parsers)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Bind and serve.

        Args:
            host: address to bind to, for example `127.0.0.1`.
            port: port, 0 = any free one.

        Returns:
            The port that is served.

        Raises:
            StartError: the port cannot be bound.
        """
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(
            tuple(self._binder.bind(service, handlers) for service, handlers in self._services.items())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in self._services]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        bound = _bind(server, host, port)
        await server.start()
        self._server = server
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self, grace: float) -> None:
        """Drain: say NOT_SERVING, end long polls and streams politely, wait for calls, close the port.

        Args:
            grace: seconds that calls under way may take before they are cut.
        """
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    reason = _bind_problem(host, port)
    if reason is not None:
        raise StartError(reason)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(_bind_problem(host, port) or f"cannot bind {address}: {error}") from error
    if bound == 0:
        raise StartError(f"cannot bind {address}; pass another --host or --port")
    return bound


def _bind_problem(host: str, port: int) -> str | None:
    """Why the address cannot be bound, asked of the operating system; None = it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"host {host!r} cannot be resolved ({error.strerror or error}); pass an address with --host"
    with socket.socket(family, kind, protocol) as probe:
        # As grpc does: else a port whose last connections linger in TIME_WAIT looks taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Binding succeeds beside a socket that is bound but not listening; listening does not.
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return (
                    f"port {port} on {host} is in use: stop the server that has it, or choose another "
                    "with --port"
                )
            return f"port {port} on {host} cannot be bound: {error.strerror}"
    return None
