"""One request on its way: read, attributed, let in or refused, its record begun."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from agl_grpc.interceptor.attribution import (
    NOT_SAMPLING,
    Attribution,
    CallContext,
    api_of,
    attribution_of_credential,
    attribution_of_headers,
    credential_of,
    parse_path,
    parse_traceparent,
)
from agl_grpc.interceptor.front.capture import Capture
from agl_grpc.interceptor.front.dialects import CAPTURED, NOTHING_ASKED, Asked, Collector
from agl_grpc.interceptor.refusals import Refusal

_CLOSED = "no such path here: only inference paths exist"
_PASSED_ONLY = {"/v1/embeddings": "embeddings", "/v1/rerank": "rerank", "/v1/score": "score"}


@dataclass
class Turn:
    """A request as far as it has come.

    `attribution` is None for a call that names no attempt; `capture` and `collector` are set once its record
    has begun and while its ids are collected.
    """

    method: str
    path: str
    query: str
    api: str
    headers: Mapping[str, str]
    attribution: Attribution | None
    credential: str
    mode_given: bool
    body: bytes = b""
    request: dict[str, Any] = field(default_factory=dict)
    asked: Asked = NOTHING_ASKED
    capture: Capture | None = None
    collector: Collector | None = None

    @property
    def recorded(self) -> bool:
        """Whether calls of this path leave records."""
        return self.method == "POST" and self.path not in NOT_SAMPLING

    @property
    def captured(self) -> bool:
        """Whether answers of this dialect can carry token ids."""
        return self.api in CAPTURED and self.method == "POST"

    @property
    def model(self) -> str:
        """The model that the request names."""
        model = self.request.get("model")
        return model if isinstance(model, str) else ""

    def context(self) -> CallContext:
        """For its record."""
        assert self.attribution is not None
        trace_id, parent = parse_traceparent(self.headers.get("traceparent", ""))
        return CallContext(self.attribution, self.api, trace_id, parent)

    def external_context(self, attribution: Attribution) -> CallContext:
        """For the record of a call that names no attempt."""
        trace_id, parent = parse_traceparent(self.headers.get("traceparent", ""))
        return CallContext(attribution, self.api, trace_id or os.urandom(16), parent)

    def digest(self) -> int:
        """Stands for the request as the client sent it, in this process."""
        return hash((self.path, self.body))

    def read(self, body: bytes) -> None:
        """Take in the body. Raises Refusal for what is no JSON object."""
        self.body = body
        if self.method != "POST":
            return
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
        if not isinstance(request, dict):
            raise Refusal(400, "invalid_json", "the body must be a JSON object")
        self.request = request


def begin(method: str, raw_path: str, headers: Mapping[str, str]) -> Turn:
    """Whose request it is and which path of the engine it means. Raises Refusal for a path that is none."""
    path, _, query = raw_path.partition("?")
    credential = credential_of(headers)
    parsed = parse_path(path)
    mode_given = True
    attribution: Attribution | None
    if parsed is not None:
        mode_given = "/mode/" in path[: len(path) - len(parsed[1])]
        attribution, path = dataclasses.replace(parsed[0], credential=credential), parsed[1]
    elif path.startswith("/rollout/"):
        raise Refusal(404, "not_found", _CLOSED)
    else:
        attribution = attribution_of_credential(credential)
        mode_given = "x-agl-mode" in headers
        named = attribution_of_headers(headers)
        if attribution is None:
            attribution = named
        elif named is not None and named.attempt_id != attribution.attempt_id:
            raise Refusal(
                403, "wrong_attempt", "the API key is the credential of another attempt", recorded=False
            )
    api = api_of(path) or _PASSED_ONLY.get(path)
    if api is None:
        raise Refusal(404, "not_found", _CLOSED)
    return Turn(method, path, query, api, headers, attribution, credential, mode_given)
