"""Requests to engines: sent to the best one, and to the next before the first byte of an answer only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

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


class Outgoing(NamedTuple):
    """A request as it goes to an engine."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def passed_headers(headers: Iterable[tuple[str, str]], key: str | None) -> CIMultiDict[str]:
    """What of a request's or an answer's headers goes on: all but those of this hop, our own and the key."""
    kept = CIMultiDict((name, value) for name, value in headers if name.lower() not in _NOT_PASSED)
    if key:
        # Each dialect has its own way to say it.
        kept["Authorization"] = f"Bearer {key}"
        kept["x-api-key"] = key
    return kept


class Exchange:
    """Sends requests to engines."""

    def __init__(self, session: aiohttp.ClientSession, upstreams: Upstreams) -> None:
        self._session = session
        self._upstreams = upstreams

    async def send(
        self, engines: Sequence[Upstream], request: Outgoing
    ) -> tuple[Upstream, aiohttp.ClientResponse]:
        """The first engine that answers, and its answer as far as its headers; Refusal when none does."""
        problem = ""
        # An engine may just have closed a connection that was kept open: a lone one is asked twice.
        order = [*engines, engines[0]] if len(engines) == 1 else list(engines)
        for number, engine in enumerate(order[:_TRIES]):
            last = number + 1 == min(len(order), _TRIES)
            try:
                answer = await self._ask(engine, request)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                problem = f"engine {engine.spec.url} cannot be reached"
                self._upstreams.failed(engine, str(error))
                continue
            except TimeoutError:
                raise Refusal(
                    504, "upstream_timeout", f"engine {engine.spec.url} did not answer in time"
                ) from None
            except aiohttp.ClientResponseError as error:
                raise upstream_failed(
                    f"engine {engine.spec.url} sent what is not HTTP: {error.message[:200]}"
                ) from error
            except (aiohttp.ClientError, OSError) as error:
                problem = f"engine {engine.spec.url} closed the connection without an answer"
                if len(engines) > 1:
                    self._upstreams.failed(engine, str(error) or type(error).__name__)
                continue
            if answer.status in _BUSY and not last and len(engines) > 1:
                problem = f"engine {engine.spec.url} answered {answer.status}"
                answer.close()
                continue
            return engine, answer
        if "without an answer" in problem:
            raise upstream_failed(problem)
        raise upstream_away(problem)

    async def _ask(self, engine: Upstream, request: Outgoing) -> aiohttp.ClientResponse:
        return await self._session.request(
            request.method,
            URL(engine.spec.url + request.path, encoded=True),
            data=request.body or None,
            headers=request.headers,
            allow_redirects=False,
        )


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """What of an engine's answer's headers the client gets."""
    kept = passed_headers(headers.items(), None)
    kept.popall("date", None)
    kept.popall("server", None)
    return kept
