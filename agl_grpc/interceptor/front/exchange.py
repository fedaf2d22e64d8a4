"""Requests to engines: sent to the best one, and to the next before the first byte of an answer only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agl_grpc.interceptor.front.http.engines import (
    CannotConnect,
    EngineAnswer,
    EngineClient,
    EngineError,
    NotHttp,
)
from agl_grpc.interceptor.front.upstreams import Upstream, Upstreams
from agl_grpc.interceptor.refusals import Refusal, upstream_away, upstream_failed

_TRIES = 3
_BUSY = frozenset({502, 503, 504})
_NOT_PASSED = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-agl-agent",
        "x-agl-mode",
        "x-agl-notrain",
        "x-agl-session",
        "x-api-key",
        "x-attempt-id",
        "x-rollout-id",
    }
)
_NOT_ANSWERED = frozenset(name.encode() for name in (*_NOT_PASSED, "date", "server"))


class Outgoing(NamedTuple):
    """A request as it goes to an engine."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes


def passed_headers(headers: Iterable[tuple[str, str]], key: str | None) -> list[tuple[str, str]]:
    """What of a request's headers goes on: all but those of this hop, our own and the key."""
    kept = [pair for pair in headers if pair[0] not in _NOT_PASSED]
    if key:
        # Each dialect has its own way to say it.
        kept += (("authorization", f"Bearer {key}"), ("x-api-key", key))
    return kept


class Exchange:
    """Sends requests to engines."""

    def __init__(self, client: EngineClient, upstreams: Upstreams) -> None:
        self._client = client
        self._upstreams = upstreams

    async def send(self, engines: Sequence[Upstream], request: Outgoing) -> tuple[Upstream, EngineAnswer]:
        """The first engine that answers, and its answer as far as its headers; Refusal when none does."""
        problem = ""
        # An engine may just have closed a connection that was kept open: a lone one is asked twice.
        order = [*engines, engines[0]] if len(engines) == 1 else list(engines)
        for number, engine in enumerate(order[:_TRIES]):
            last = number + 1 == min(len(order), _TRIES)
            try:
                answer = await self._client.request(engine.spec.url, *request)
            except CannotConnect as error:
                problem = f"engine {engine.spec.url} cannot be reached"
                self._upstreams.failed(engine, str(error))
                continue
            except TimeoutError:
                raise Refusal(
                    504, "upstream_timeout", f"engine {engine.spec.url} did not answer in time"
                ) from None
            except NotHttp as error:
                raise upstream_failed(
                    f"engine {engine.spec.url} sent what is not HTTP: {str(error)[:200]}"
                ) from error
            except EngineError as error:
                problem = f"engine {engine.spec.url} closed the connection without an answer"
                if len(engines) > 1:
                    self._upstreams.failed(engine, str(error))
                continue
            if answer.status in _BUSY and not last and len(engines) > 1:
                problem = f"engine {engine.spec.url} answered {answer.status}"
                answer.close()
                continue
            return engine, answer
        if "without an answer" in problem:
            raise upstream_failed(problem)
        raise upstream_away(problem)


def answer_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What of an engine's answer's headers the client gets."""
    return [pair for pair in headers if pair[0] not in _NOT_ANSWERED]
