"""The gRPC door: binding, settings, health, reflection, graceful drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from agl_grpc.store import limits
from agl_grpc.store.door.call import Authenticator
from agl_grpc.store.door.health import Health
from agl_grpc.store.door.http2.server import Http2Server
from agl_grpc.store.door.service import Parser, ServiceBinder

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = limits.MESSAGE_BYTES
"""Largest message in either direction."""

_BACKLOG = 1024


class StartError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""


class GrpcDoor:
    """One gRPC port that serves the contract's services, health and reflection.

    Args:
        services: handler objects of each service; see `agl_grpc.store.door.service`.
        authenticator: says who calls.
        parsers: views that replace generated request types, by method name.
        tls: how to speak TLS; None = without.
    """

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Sequence[object]],
        authenticator: Authenticator,
        parsers: Mapping[str, Parser],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.draining = asyncio.Event()
        """Set as soon as the server is on its way out."""
        self._services = services
        self._binder = ServiceBinder(authenticator, self.draining, parsers)
        self._health = Health()
        self._tls = tls
        self._server: Http2Server | None = None
        self._sockets: list[socket.socket] = []

    def bind(self, host: str, port: int, option: str = "--port") -> int:
        """Binds a port, or one more.

        Args:
            host: address to bind to, for example `127.0.0.1`.
            port: port, 0 = any free one.
            option: the command's option that chooses it, for the message.

        Returns:
            The port.

        Raises:
            StartError: the port cannot be bound.
        """
        sockets = listening_sockets(host, port, option)
        self._sockets += sockets
        return int(sockets[0].getsockname()[1])

    async def serve(self) -> None:
        """Serves what is bound."""
        server = Http2Server(max_message_bytes=MAX_MESSAGE_BYTES)
        server.add_generic_rpc_handlers(
            [self._binder.bind(service, handlers) for service, handlers in self._services.items()]
        )
        # Generated code, typed for gRPC's own servers; two methods are all that it calls.
        as_server: Any = server
        health_pb2_grpc.add_HealthServicer_to_server(self._health, as_server)
        names = [service.full_name for service in self._services]
        shown = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(reflection.aio.ReflectionServicer(shown), as_server)
        sockets, self._sockets = self._sockets, []
        await server.listen(sockets, self._tls)
        self._server = server
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Drain: say NOT_SERVING, end long polls and streams politely, wait for calls, close the port.

        Args:
            grace: seconds that calls under way may take before they are cut.
        """
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        for one in self._sockets:
            one.close()
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None


def listening_sockets(host: str, port: int, option: str = "--port") -> list[socket.socket]:
    """Sockets that listen, one for each address of the host; `option` is how a caller chooses the port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(
            f"host {host!r} cannot be resolved ({error.strerror or error}); pass an address with --host"
        ) from error
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        # Every address gets the same port, also when any free one was asked for.
        chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
        one = socket.socket(family, kind, protocol)
        try:
            _listen(one, (address[0], chosen, *address[2:]))
        except OSError as error:
            one.close()
            problem = error
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # `localhost` names an address of IPv6 also where there is none
            break
        sockets.append(one)
    if problem is not None and (not sockets or problem.errno == errno.EADDRINUSE):
        for one in sockets:
            one.close()
        raise StartError(_explain(host, port, problem, option)) from problem
    return sockets


def _listen(one: socket.socket, address: tuple[Any, ...]) -> None:
    # Else a port whose last connections linger in TIME_WAIT looks taken.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
    one.bind(address)
    # Binding succeeds beside a socket that is bound but not listening; listening does not.
    one.listen(_BACKLOG)


def _explain(host: str, port: int, problem: OSError, option: str) -> str:
    if problem.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use: stop the server that has it, or choose another with {option}"
        )
    return f"port {port} on {host} cannot be bound: {problem.strerror}"
