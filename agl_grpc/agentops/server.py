"""The endpoints that the AgentOps SDK calls; spans are handed on to the store's OTLP service.

Whose a span is, its attributes or its resource's say (``agentlightning.rollout_id`` and ``…attempt_id``), or
the API key does: an attempt's credential is a key for that attempt alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from agl_grpc.client.channel import OPTIONS
from agl_grpc.store.door.credentials import looks_like_credential
from agl_grpc.store.http.app import HttpApp
from agl_grpc.store.http.door import HttpDoor
from agl_grpc.store.http.problems import HttpProblem
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.otlp.handlers import refuse_metrics

log = logging.getLogger(__name__)

DEFAULT_PORT = 8002
"""Where clients look for the server."""

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_PROTOBUF = b"application/x-protobuf"
_STORE_SECONDS = 10.0
_GRACE_SECONDS = 5.0
_STATUSES = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
}


@dataclass(frozen=True)
class ServerConfig:
    """How the server runs: where it listens, and where the store is."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    store: str = "127.0.0.1:4747"


class AgentOpsServer:
    """A running server. Make it with `AgentOpsServer.start`.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.port = 0
        self._config = config
        self._channel = grpc.aio.insecure_channel(config.store, options=OPTIONS)
        self._export: Any = self._channel.unary_unary(_EXPORT)
        self._door = HttpDoor(HttpApp([self._routes()]), _GRACE_SECONDS)

    @classmethod
    async def start(cls, config: ServerConfig) -> AgentOpsServer:
        """Listens; the store need not be there yet.

        Raises:
            StartError: The port cannot be bound; one line says why.
        """
        server = cls(config)
        try:
            server.port = server._door.bind(config.host, config.port, "--port")
            await server._door.start()
        except BaseException:
            await server.stop()
            raise
        return server

    async def stop(self) -> None:
        """Lets requests under way end."""
        await self._door.stop()
        await self._channel.close()

    def _routes(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/health"): self._health,
            ("POST", "/v3/auth/token"): self._sign_in,
            ("POST", "/v1/traces"): self._traces,
            ("POST", "/v1/metrics"): self._metrics,
            ("POST", "/v4/objects/upload/"): self._upload,
            ("POST", "/v4/logs/upload/"): self._upload,
        }

    async def _health(self, _http: Request) -> Answer:
        return _json({"status": "ok", "store": self._config.store, "process": os.getpid()})

    async def _sign_in(self, http: Request) -> Answer:
        """Every key is good; the token is the key, so that an attempt's credential comes with its spans."""
        body = await http.json()
        key = body.get("api_key") if isinstance(body, dict) else None
        if not isinstance(key, str) or not key:
            raise HttpProblem(422, "INVALID_FIELD", "api_key must be text", "api_key")
        return _json({"token": key, "project_id": "agl-grpc", "project_prem_status": "pro"})

    async def _traces(self, http: Request) -> Answer:
        body = await _protobuf(http, "spans")
        scheme, _, bearer = http.header(b"authorization").partition(" ")
        # Keys that are no credentials mean nothing to the store.
        known = scheme.lower() == "bearer" and looks_like_credential(bearer.strip())
        metadata = (("authorization", f"Bearer {bearer.strip()}"),) if known else ()
        try:
            answer = await self._export(body, metadata=metadata, timeout=_STORE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _refusal(self._config.store, error) from error
        told = trace_service_pb2.ExportTraceServiceResponse.FromString(answer)
        if told.partial_success.rejected_spans:
            log.warning("%s", told.partial_success.error_message)
        return Answer(answer, media_type=_PROTOBUF)

    async def _metrics(self, http: Request) -> Answer:
        """AgentOps' own usage counts, which nobody keeps: read, and refused as the store's own door does."""
        body = await _protobuf(http, "metrics")
        try:
            request = metrics_service_pb2.ExportMetricsServiceRequest.FromString(body)
        except DecodeError as error:
            what = "the body cannot be read: the bytes are not a request of this signal"
            raise HttpProblem(400, "BODY_MALFORMED", what) from error
        return Answer(refuse_metrics(request).SerializeToString(), media_type=_PROTOBUF)

    async def _upload(self, http: Request) -> Answer:
        """Files beside the spans (screenshots, captured output): taken and dropped."""
        body = await http.body()
        return _json({"url": "", "size": len(body)})


async def _protobuf(http: Request, what: str) -> bytes:
    body = await http.body()
    if http.media_type not in ("application/x-protobuf", "application/protobuf"):
        raise HttpProblem(415, "MEDIA_TYPE_UNSUPPORTED", f"send {what} as application/x-protobuf")
    return body


def _json(value: Any) -> Answer:
    return Answer(orjson.dumps(value))


def _refusal(store: str, error: grpc.aio.AioRpcError) -> HttpProblem:
    status = _STATUSES.get(error.code(), 503)
    detail = (error.details() or error.code().name).splitlines()[0]
    headers = ((b"retry-after", b"1"),) if status == 503 else ()
    return HttpProblem(status, error.code().name, f"the store at {store}: {detail}", headers=headers)


async def serve(config: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartError: The port cannot be bound.
    """
    server = await AgentOpsServer.start(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("AgentOps server at http://%s:%d; spans go to %s", config.host, server.port, config.store)
    await stop.wait()
    await server.stop()
