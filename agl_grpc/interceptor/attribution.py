"""Whose model call it is: from the URL by which the agent reaches the engine, or from its API key."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from agl_grpc.interceptor.attempts import KnownAttempt
    from agl_grpc.interceptor.inside.held import HeldAnswer

STATUS_PATH = "/agl/interceptor"
"""Where an interceptor tells how it is."""

_BASE = re.compile(
    r"^/rollout/(?P<rollout>[^/]+)/attempt/(?P<attempt>[^/]+)"
    r"(?:/agent/(?P<agent>[^/]+))?(?:/mode/(?P<mode>train|val|test))?(?P<notrain>/notrain)?(?P<rest>/.*)$"
)

INFERENCE_APIS = {
    "/v1/chat/completions": "chat.completions",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/inference/v1/generate": "generate",
    # These sample nothing, but SDKs call them on the base URL they were given.
    "/v1/models": "models",
    "/v1/messages/count_tokens": "messages",
}
"""Paths that exist under an attempt's base URL, with the dialect's name in the contract."""

NOT_SAMPLING = frozenset({"/v1/models", "/v1/messages/count_tokens"})
"""Of these, what samples nothing: it leaves no record and counts for no limit."""

_RESPONSE_BY_ID = re.compile(r"^/v1/responses/[^/]+(/cancel)?$")


@dataclass(frozen=True)
class Attribution:
    """The attempt that a call belongs to, the agent's part that made it, and whether it may be trained."""

    rollout_id: str
    attempt_id: str
    agent_name: str = ""
    mode: str = "train"
    notrain: bool = False
    credential: str = ""


@dataclass
class CallContext:
    """One HTTP request of an attempt while it is served.

    Inside the engine `answer` is on the way, and `known` is what the store says of the attempt. `external` is
    set where the request names no attempt but is recorded all the same: its session, which may be empty.
    """

    attribution: Attribution
    api: str
    trace_id: bytes = b""
    parent_span_id: bytes = b""
    external: str | None = None
    answer: HeldAnswer | None = None
    known: KnownAttempt | None = None


CURRENT: ContextVar[CallContext | None] = ContextVar("agl_interceptor_call", default=None)
"""The request being served in this task; None for requests without attribution."""


def parse_path(path: str) -> tuple[Attribution, str] | None:
    """Split an attributed path into whose it is and the engine's own path; None when it is not one.

    The base URL is ``/rollout/ID/attempt/ID``, then optionally ``/agent/NAME``, ``/mode/train|val|test`` and
    ``/notrain`` in this order, then the engine's path.
    """
    match = _BASE.match(path)
    if match is None:
        return None
    attribution = Attribution(
        rollout_id=unquote(match["rollout"]),
        attempt_id=unquote(match["attempt"]),
        agent_name=unquote(match["agent"] or ""),
        mode=match["mode"] or "train",
        notrain=match["notrain"] is not None,
    )
    return attribution, match["rest"]


def names_mode(path: str) -> bool:
    """Whether an attributed path says in which mode it samples; else the rollout's own counts."""
    match = _BASE.match(path)
    return match is not None and match["mode"] is not None


def credential_of(headers: Mapping[str, str]) -> str:
    """The API key that a client sent, in the way of either vendor; empty when it sent none."""
    bearer = headers.get("authorization", "")
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    return headers.get("x-api-key", "").strip()


def attribution_of_credential(credential: str) -> Attribution | None:
    """The attempt named by an attempt credential (``agl1.<claims>.<signature>``) used as API key, or None.

    The signature is the store's to check; the claims alone say where the call's record belongs.
    """
    parts = credential.split(".")
    if len(parts) != 3 or parts[0] != "agl1":
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        _, rollout_id, attempt_id, _ = claims
    except (ValueError, TypeError):
        return None
    if not isinstance(rollout_id, str) or not isinstance(attempt_id, str):
        return None
    return Attribution(rollout_id, attempt_id, credential=credential)


def attribution_of_headers(headers: Mapping[str, str]) -> Attribution | None:
    """The attempt that a client names by headers on a plain ``/v1/…`` path, or None.

    ``x-rollout-id`` and ``x-attempt-id`` name it; ``x-agl-agent``, ``x-agl-mode`` and ``x-agl-notrain`` say
    what the segments of a base URL say.
    """
    rollout_id, attempt_id = headers.get("x-rollout-id", ""), headers.get("x-attempt-id", "")
    if not rollout_id or not attempt_id:
        return None
    mode = headers.get("x-agl-mode", "")
    return Attribution(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        agent_name=headers.get("x-agl-agent", ""),
        mode=mode if mode in ("train", "val", "test") else "train",
        notrain="x-agl-notrain" in headers,
    )


def api_of(path: str) -> str | None:
    """The dialect of an engine path, or None when agents have no business there."""
    if _RESPONSE_BY_ID.match(path):
        return "responses"
    return INFERENCE_APIS.get(path)


def parse_traceparent(header: str) -> tuple[bytes, bytes]:
    """Trace id (16 bytes) and parent span id (8 bytes) of a W3C ``traceparent``; empty when there is none."""
    match = re.fullmatch(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}.*", header.strip().lower())
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return b"", b""
    return bytes.fromhex(match[1]), bytes.fromhex(match[2])
