"""A proxy in the test's own loop, before fake engines and a store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from agl_grpc.interceptor.front.server import Proxy
from agl_grpc.interceptor.front.settings import ProxySettings, UpstreamSpec
from tests.interceptor.front.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Rig:
    """The proxy and a client of it."""

    proxy: Proxy
    http: httpx.AsyncClient

    def base(self, rollout: str = "ro-1", attempt: str = "at-1", more: str = "") -> str:
        return f"{self.proxy.url}/rollout/{rollout}/attempt/{attempt}{more}"

    async def chat(self, base: str = "", **more: Any) -> httpx.Response:
        return await self.http.post((base or self.base()) + CHAT, json={**HELLO, **more})

    def state(self) -> dict[str, Any]:
        return self.proxy.describe()


@asynccontextmanager
async def proxy_before(
    store: str, folder: Path, *engines: FakeEngine | UpstreamSpec, **settings: Any
) -> AsyncIterator[Rig]:
    """A proxy that serves these engines."""
    specs = [each if isinstance(each, UpstreamSpec) else UpstreamSpec(each.url) for each in engines]
    made = ProxySettings(store=store, spool_dir=str(folder / "spool"), **{"drain_timeout": 1.0, **settings})
    proxy = await Proxy.start(made, specs, "127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            yield Rig(proxy, http)
    finally:
        await proxy.stop()
