"""Engines behind the proxy: which one serves a rollout, and which are well."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from agl_grpc.interceptor.front.http.engines import EngineClient, EngineError
from agl_grpc.interceptor.front.settings import UpstreamSpec
from agl_grpc.interceptor.refusals import Refusal

logger = logging.getLogger("agl_grpc.interceptor")

_PROBE_SECONDS = 5.0
_PROBE_SICK_SECONDS = 0.5
_PROBE_TIMEOUT = 3.0


@dataclass
class Upstream:
    """One engine."""

    spec: UpstreamSpec
    healthy: bool = True
    version: str = ""
    ids_refused: bool = False
    """It has answered that it knows no ``return_token_ids``."""
    in_flight: int = 0

    @property
    def engine_id(self) -> str:
        """Its name in records: host and port."""
        return self.spec.url.split("://", 1)[1]


def rank(key: str, urls: Iterable[str]) -> list[str]:
    """The engines in the order in which a key prefers them (rendezvous hashing).

    An engine that comes or goes moves only the keys that prefer it.
    """

    def weight(url: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{url}".encode(), digest_size=8).digest()

    return sorted(urls, key=weight, reverse=True)


class Upstreams:
    """The engines by model; probes each one's ``/health`` every 5 s, a sick one twice a second."""

    def __init__(self, client: EngineClient, specs: Sequence[UpstreamSpec]) -> None:
        self._client = client
        self._engines: dict[tuple[str, str], Upstream] = {}
        self._probes: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.set(specs)

    def set(self, specs: Sequence[UpstreamSpec]) -> None:
        """These are the engines from now on; requests that run on others go on."""
        named = {(spec.model, spec.url): spec for spec in specs}
        for key in [key for key in self._engines if key not in named]:
            del self._engines[key]
            self._probes.pop(key).cancel()
        for key, spec in named.items():
            known = self._engines.get(key)
            if known is not None:
                known.spec = spec
                continue
            engine = self._engines[key] = Upstream(spec)
            self._probes[key] = asyncio.create_task(self._probe(engine))

    def all(self) -> list[Upstream]:
        """Every engine."""
        return list(self._engines.values())

    def for_call(self, model: str, key: str) -> list[Upstream]:
        """Engines of a model, best first for this key: healthy ones by preference, then sick ones.

        Those that drain are left out while others serve the model. Raises Refusal for a model that nobody
        serves.
        """
        named = [engine for engine in self._engines.values() if engine.spec.model == model]
        engines = named or [engine for engine in self._engines.values() if not engine.spec.model]
        if not engines:
            known = sorted({engine.spec.model for engine in self._engines.values()})
            raise Refusal(
                404, "model_not_found", f"no engine serves model {model!r}; there are: {', '.join(known)}"
            )
        engines = [engine for engine in engines if not engine.spec.draining] or engines
        by_url = {engine.spec.url: engine for engine in engines}
        ranked = [by_url[url] for url in rank(key, by_url)] if len(by_url) > 1 else engines
        return sorted(ranked, key=lambda engine: not engine.healthy)

    def failed(self, engine: Upstream, reason: str) -> None:
        """A request found the engine dead: it is left alone until a probe finds it well."""
        if engine.healthy:
            logger.warning("engine %s failed: %s", engine.spec.url, reason)
        engine.healthy = False

    async def close(self) -> None:
        """Stop probing."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)

    async def _probe(self, engine: Upstream) -> None:
        while True:
            well = await self._is_well(engine)
            if well != engine.healthy:
                logger.warning("engine %s is %s", engine.spec.url, "well" if well else "not well")
            engine.healthy = well
            if well and not engine.version:
                engine.version = await self._version(engine)
            for _ in range(round(_PROBE_SECONDS / _PROBE_SICK_SECONDS)):
                await asyncio.sleep(_PROBE_SICK_SECONDS)
                if not engine.healthy:
                    break

    async def _is_well(self, engine: Upstream) -> bool:
        """Any answer but a server error will do: hosted engines have no such path."""
        answer = await self._get(engine, "/health")
        return answer is not None and answer[0] < 500

    async def _version(self, engine: Upstream) -> str:
        """What vLLM says of itself; ``unknown`` elsewhere."""
        answer = await self._get(engine, "/version")
        try:
            said = orjson.loads(answer[1]) if answer is not None and answer[0] == 200 else {}
        except orjson.JSONDecodeError:
            return "unknown"
        version = said.get("version") if isinstance(said, dict) else None
        return f"vllm {version}" if isinstance(version, str) else "unknown"

    async def _get(self, engine: Upstream, path: str) -> tuple[int, bytes] | None:
        """Status and body; None when the engine does not answer."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                answer = await self._client.request(engine.spec.url, "GET", path, ())
                try:
                    return answer.status, await answer.read()
                finally:
                    answer.close()
        except (EngineError, TimeoutError):
            return None
