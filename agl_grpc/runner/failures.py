"""Who is to blame when an agent stops with an exception."""

from __future__ import annotations

from agl_grpc.agent import ResourceMissing
from agl_grpc.model.enums import FailureKind
from agl_grpc.model.failure import Failure

RESOURCE_MISSING = "RESOURCE_MISSING"
"""Type of the failure of an attempt whose resources are not published."""

# Classes by package and name, so that none of these packages is imported to look at an exception.
_ENGINE_UNREACHABLE = frozenset(
    {
        ("aiohttp", "ClientConnectionError"),
        ("anthropic", "APIConnectionError"),
        ("httpcore", "NetworkError"),
        ("httpcore", "ProtocolError"),
        ("httpcore", "TimeoutException"),
        ("httpx", "TransportError"),
        ("litellm", "APIConnectionError"),
        ("litellm", "ServiceUnavailableError"),
        ("openai", "APIConnectionError"),
        ("requests", "ConnectionError"),
        ("urllib3", "HTTPError"),
    }
)
_STATUS_ERRORS = frozenset({("openai", "APIStatusError"), ("anthropic", "APIStatusError")})
_GATEWAY_STATUS = frozenset({502, 503, 504})


class AgentFailure(Exception):
    """Raised by an agent that knows who is to blame for its failure.

    `kind` is `agent`, `environment` (a tool or sandbox broke), `grader` (no reward could be found),
    `truncated` (a limit cut it short) or `infrastructure`. Any other exception counts as the agent's
    own, unless it tells that the model engine could not be reached.
    """

    def __init__(self, message: str, *, kind: FailureKind | str = FailureKind.AGENT) -> None:
        super().__init__(message)
        self.kind = FailureKind.parse(kind)
        if self.kind is FailureKind.CANCELLED:
            raise ValueError("an agent cannot cancel its own attempt; raise another kind")


def failure_of(error: BaseException) -> Failure:
    """The failure that `error`, raised by an agent, is recorded as: kind, first line, type and traceback."""
    failure = Failure.from_exception(error, kind_of(error))
    if isinstance(error, ResourceMissing):
        failure.type = RESOURCE_MISSING
    if isinstance(error, SystemExit):
        failure.message = f"the agent called sys.exit({error.code!r})"
    return failure


def kind_of(error: BaseException) -> FailureKind:
    """Who is to blame: the infrastructure where an engine or a resource was not there, else the agent.

    Explicit causes (`raise … from …`) are looked into; an exception that merely happened while
    another was handled is a mistake of the agent itself.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, AgentFailure):
            return current.kind
        if isinstance(current, ResourceMissing) or _engine_unreachable(current):
            return FailureKind.INFRASTRUCTURE
        current = current.__cause__
    if isinstance(error, BaseExceptionGroup) and {kind_of(member) for member in error.exceptions} == {
        FailureKind.INFRASTRUCTURE
    }:
        return FailureKind.INFRASTRUCTURE
    return FailureKind.AGENT


def _engine_unreachable(error: BaseException) -> bool:
    if isinstance(error, ConnectionError):
        return True
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
    if names & _ENGINE_UNREACHABLE:
        return True
    return bool(names & _STATUS_ERRORS) and getattr(error, "status_code", 0) in _GATEWAY_STATUS
