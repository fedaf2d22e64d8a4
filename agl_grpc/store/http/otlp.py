"""OTLP over HTTP: protobuf and JSON, plain and compressed, with the answers that exporters understand."""

from __future__ import annotations

import base64
import binascii
import gzip
from collections.abc import Mapping
from typing import Any

import orjson
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from agl_grpc.store.door.methods import Methods
from agl_grpc.store.errors import StoreError
from agl_grpc.store.http.problems import HttpProblem, problem_of
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.otlp.handlers import Refusals
from agl_grpc.store.otlp.views import RawTraceRequest

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

_WORTH_BYTES = 1024
_CODES = {401: code_pb2.UNAUTHENTICATED, 403: code_pb2.PERMISSION_DENIED, 503: code_pb2.UNAVAILABLE}


class OtlpRoutes:
    """Serves OTLP's routes."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path."""
        return {
            ("POST", "/v1/traces"): self._guarded(self.traces),
            ("POST", "/v1/logs"): self._guarded(self.logs),
            ("POST", "/v1/metrics"): self._guarded(self.metrics),
            ("POST", "/v1/development/profiles"): self._guarded(self.profiles),
        }

    async def traces(self, http: Request) -> Answer:
        """Spans."""
        kind, body = await _body(http)
        refused = Refusals()
        request = _traces_from_json(_object(body), refused) if kind == JSON else _parse(RawTraceRequest, body)
        response = await self._methods(request, http.metadata)
        if refused.count:
            told = response.partial_success
            refused.note(told.rejected_spans, told.error_message)
            refused.tell(response)
        return _answer(http, kind, response)

    async def logs(self, http: Request) -> Answer:
        """Log records: none is kept."""
        return await self._not_kept(http, logs_service_pb2.ExportLogsServiceRequest())

    async def metrics(self, http: Request) -> Answer:
        """Metrics: none is kept."""
        return await self._not_kept(http, metrics_service_pb2.ExportMetricsServiceRequest())

    async def profiles(self, _http: Request) -> Answer:
        """Profiles: a signal that is not served at all."""
        raise HttpProblem(501, "METHOD_UNIMPLEMENTED", "profiles are not taken; send traces")

    async def _not_kept(self, http: Request, request: Message) -> Answer:
        kind, body = await _body(http)
        if kind == JSON:
            try:
                json_format.ParseDict(_object(body), request, ignore_unknown_fields=True)
            except json_format.ParseError as error:
                raise _bad(str(error)) from error
        else:
            request = _parse(type(request), body)
        return _answer(http, kind, await self._methods(request, http.metadata))

    def _guarded(self, serve: Handler) -> Handler:
        async def guarded(http: Request) -> Answer:
            try:
                return await serve(http)
            except (HttpProblem, StoreError) as error:
                return _refusal(http, error)

        return guarded


async def _body(http: Request) -> tuple[str, bytes]:
    """The body's type and its bytes."""
    body = await http.body()
    kind = http.media_type
    if kind in (PROTOBUF, "application/protobuf"):
        return PROTOBUF, body
    if kind == JSON:
        return JSON, body
    raise HttpProblem(
        415,
        "MEDIA_TYPE_UNSUPPORTED",
        f"Content-Type {kind or '(none)'!r} is not OTLP; send {PROTOBUF} or {JSON}",
    )


def _parse(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise _bad("the bytes are not a request of this signal") from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise _bad(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _bad("it must be a JSON object")
    return value


def _bad(why: str, path: str = "") -> HttpProblem:
    """The body is not as it should be; with a path, `why` completes the sentence that begins with it."""
    what = f"{path} {why}" if path else why
    return HttpProblem(400, "BODY_MALFORMED", f"the body cannot be read: {what}", path)


def _traces_from_json(value: dict[str, Any], refused: Refusals) -> Any:
    """OTLP's JSON, in which ids are hex; a span that cannot be read is refused alone."""
    request = RawTraceRequest()
    for place, of_resource in enumerate(_list(value, "resourceSpans", "")):
        path = f"resourceSpans[{place}]"
        if not isinstance(of_resource, dict):
            raise _bad("must be an object", path)
        found = request.resource_spans.add(schema_url=str(of_resource.get("schemaUrl") or ""))
        resource = _message(of_resource.get("resource") or {}, resource_pb2.Resource(), f"{path}.resource")
        found.resource = resource.SerializeToString()
        for number, of_scope in enumerate(_list(of_resource, "scopeSpans", path)):
            where = f"{path}.scopeSpans[{number}]"
            if not isinstance(of_scope, dict):
                raise _bad("must be an object", where)
            group = found.scope_spans.add()
            scope = of_scope.get("scope") or {}
            group.scope.MergeFrom(_message(scope, common_pb2.InstrumentationScope(), f"{where}.scope"))
            for index, span in enumerate(_list(of_scope, "spans", where)):
                try:
                    group.spans.append(_span_from_json(span, f"{where}.spans[{index}]"))
                except HttpProblem as error:
                    refused.note(1, error.detail)
    return request


def _list(value: dict[str, Any], name: str, path: str) -> list[Any]:
    found = value.get(name)
    if found is not None and not isinstance(found, list):
        raise _bad("must be a list", f"{path}.{name}".lstrip("."))
    return found or []


def _span_from_json(span: Any, path: str) -> bytes:
    if not isinstance(span, dict):
        raise _bad("must be an object", path)
    span = _with_ids(span, ("traceId", "spanId", "parentSpanId"), path)
    links = span.get("links")
    if isinstance(links, list):
        span["links"] = [
            _with_ids(link, ("traceId", "spanId"), f"{path}.links[{i}]") if isinstance(link, dict) else link
            for i, link in enumerate(links)
        ]
    data: bytes = _message(span, trace_pb2.Span(), path).SerializeToString()
    return data


def _with_ids(value: dict[str, Any], names: tuple[str, ...], path: str) -> dict[str, Any]:
    """A copy in which ids are base64, as protobuf's reader of JSON wants them."""
    changed = dict(value)
    for name in names:
        text = value.get(name)
        if not text:
            continue
        try:
            changed[name] = base64.b64encode(binascii.unhexlify(text)).decode()
        except (binascii.Error, TypeError, ValueError):
            raise _bad("must be hex digits", f"{path}.{name}") from None
    return changed


def _message(value: Any, message: Any, path: str) -> Any:
    try:
        return json_format.ParseDict(value, message, ignore_unknown_fields=True)
    except (json_format.ParseError, TypeError, ValueError, AttributeError) as error:
        raise _bad(f"is not as OTLP says: {error}", path) from error


def _answer(http: Request, kind: str, response: Message, status: int = 200, headers: Any = ()) -> Answer:
    """An answer in the type in which the request came."""
    body = json_format.MessageToJson(response).encode() if kind == JSON else response.SerializeToString()
    accepted = [token.partition(";")[0].strip() for token in http.header(b"accept-encoding").split(",")]
    more = tuple(headers)
    if "gzip" in accepted and len(body) > _WORTH_BYTES:
        body, more = gzip.compress(body, 1), (*more, (b"content-encoding", b"gzip"))
    return Answer(body, status, kind.encode(), more)


def _refusal(http: Request, error: HttpProblem | StoreError) -> Answer:
    """An error as google.rpc.Status, which OTLP asks for."""
    problem = problem_of(error)
    if isinstance(error, StoreError):
        status = error.to_status()
    else:
        status = status_pb2.Status(
            code=_CODES.get(problem.status, code_pb2.INVALID_ARGUMENT), message=error.detail
        )
    if http.media_type in (PROTOBUF, "application/protobuf"):
        return _answer(http, PROTOBUF, status, problem.status, problem.headers)
    # Reason and field besides, as everywhere else on this port.
    body = orjson.dumps({"code": status.code, "message": status.message, **problem.body})
    return Answer(body, problem.status, JSON.encode(), tuple(problem.headers))


def otlp_routes(methods: Methods) -> Mapping[tuple[str, str], Handler]:
    """Handlers by method and path."""
    return OtlpRoutes(methods).routes()
