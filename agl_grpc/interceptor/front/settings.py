"""What the proxy is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agl_grpc.interceptor.settings import CaptureSettings

LOGPROBS_MODES = ("unknown", "raw", "processed")


class UpstreamSpec(NamedTuple):
    """An engine: its root URL (without ``/v1``), the model that it serves (empty: any), whether it drains."""

    url: str
    model: str = ""
    draining: bool = False


class BadUpstream(ValueError):
    """What was given does not name an engine."""


@dataclass(frozen=True)
class ProxySettings(CaptureSettings):
    """Settings of one proxy, besides `CaptureSettings`. Times are in seconds.

    Attributes:
        logprobs_mode: what the engines' logprobs mean; ``unknown``: only calls at temperature 1 without
            filters are trained, where both meanings are one.
        token_ids: ask engines for token ids and logprobs; False for hosted ones that refuse unknown fields.
        max_in_flight: requests served at one time; more are answered 503.
        upstream_key: the engines' API key; None: an agent's own key is passed on unless it is a credential.
        connect_timeout: for a connection to an engine.
        read_timeout: longest silence of an engine.
        drain_timeout: how long running requests may take once the proxy is told to stop.
    """

    logprobs_mode: str = "unknown"
    token_ids: bool = True
    max_in_flight: int = 4096
    upstream_key: str | None = None
    connect_timeout: float = 5.0
    read_timeout: float = 600.0
    drain_timeout: float = 30.0

    def spool_path(self, port: int) -> Path:
        """Folder of the spool of a proxy at this port."""
        return self.spool_under(f"proxy-{port}")


def parse_upstream(text: str) -> UpstreamSpec:
    """``URL`` or ``MODEL=URL``; a trailing ``/v1`` of the URL does not matter. Raises BadUpstream."""
    name, separator, url = text.strip().partition("=http")
    if separator:
        url = f"http{url}"
    else:
        name, url = "", name
    if not url.startswith(("http://", "https://")) or len(url.split("://", 1)[1]) == 0:
        raise BadUpstream(f"upstream {text!r}: write URL or MODEL=URL, for example http://127.0.0.1:8000")
    return UpstreamSpec(url.rstrip("/").removesuffix("/v1"), name)


def read_upstreams(path: Path) -> list[UpstreamSpec]:
    """Engines of a file: one ``[MODEL=]URL [drain]`` a line, ``#`` begins a comment. Raises BadUpstream."""
    specs: list[UpstreamSpec] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[1:] not in ([], ["drain"]):
            raise BadUpstream(f"{path}:{number}: after the URL only `drain` may stand, not {words[1]!r}")
        specs.append(parse_upstream(words[0])._replace(draining=len(words) > 1))
    return specs
