"""The proxy: its parts held together, its HTTP door, its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Sequence
from typing import Any

import grpc
import orjson

from agl_grpc.interceptor.attempts import Attempts
from agl_grpc.interceptor.attribution import STATUS_PATH
from agl_grpc.interceptor.capture.spool import Spool, gather, hold
from agl_grpc.interceptor.capture.transport import AppendTransport, open_channel
from agl_grpc.interceptor.external import ExternalTraffic
from agl_grpc.interceptor.front.handler import JSON, Handler
from agl_grpc.interceptor.front.http.door import Door, Incoming
from agl_grpc.interceptor.front.http.engines import EngineClient
from agl_grpc.interceptor.front.journal import Journal
from agl_grpc.interceptor.front.peers import Peers, Share
from agl_grpc.interceptor.front.recording import Parts
from agl_grpc.interceptor.front.settings import ProxySettings, UpstreamSpec
from agl_grpc.interceptor.front.upstreams import Upstreams
from agl_grpc.interceptor.front.versions import PolicyVersions
from agl_grpc.interceptor.limits import RolloutLimits

logger = logging.getLogger("agl_grpc.interceptor")


class Proxy:
    """A running proxy; `start` makes one, `stop` ends it."""

    def __init__(self, parts: Parts, channel: grpc.aio.Channel, listening: socket.socket) -> None:
        self._parts = parts
        self._channel = channel
        self._listening = listening
        self._handler = Handler(parts)
        self._door = Door(self._answer, parts.settings.max_body)
        self._peers: Peers | None = None

    @classmethod
    async def start(
        cls,
        settings: ProxySettings,
        upstreams: Sequence[UpstreamSpec],
        host: str,
        port: int,
        share: Share | None = None,
    ) -> Proxy:
        """Listen and serve; the store is not waited for. `share` is set in one of several processes.

        Raises OSError when the address cannot be had, SpoolInUse when another process has the spool.
        """
        listening = listen(host, port) if share is None else share.listening
        try:
            if share is None:
                folder = settings.spool_path(listening.getsockname()[1])
                with hold(folder):
                    gather(folder, 1)
            spool = Spool(
                settings.spool_path(listening.getsockname()[1]),
                settings.spool_bytes,
                reuse=True,
            )
        except BaseException:
            listening.close()
            raise
        channel = open_channel(settings.store)
        client = EngineClient(settings.connect_timeout, settings.read_timeout)
        journal = Journal(AppendTransport(channel), spool, settings.ack_timeout)
        parts = Parts(
            settings=settings,
            client=client,
            upstreams=Upstreams(client, upstreams),
            journal=journal,
            attempts=Attempts(channel),
            versions=PolicyVersions(channel, settings.run_id, settings.policy_version),
            limits=RolloutLimits(settings.max_calls, settings.max_tokens, settings.max_concurrency),
            external=ExternalTraffic(channel, journal, settings.external_run)
            if settings.unattributed == "record"
            else None,
        )
        proxy = cls(parts, channel, listening)
        if share is not None:
            proxy._peers = proxy._door.peers = Peers(share, proxy._door.take, proxy.describe)
        await proxy._door.open(listening)
        return proxy

    @property
    def url(self) -> str:
        """Its root."""
        return url_of(self._listening)

    def set_upstreams(self, specs: Sequence[UpstreamSpec]) -> None:
        """Serve by these engines from now on."""
        self._parts.upstreams.set(specs)

    def describe(self) -> dict[str, Any]:
        """Counters for people."""
        external = self._parts.external
        return {
            "enabled": True,
            "run_id": self._parts.settings.run_id,
            **dataclasses.asdict(self._handler.counters),
            "refusals": dict(self._handler.recorder.refusals.counts),
            **self._parts.journal.describe(),
            "policy_versions": self._parts.versions.describe(),
            "external_recorded": external.recorded if external else 0,
            "external_dropped": external.dropped if external else 0,
            "upstreams": [
                {
                    "url": engine.spec.url,
                    "model": engine.spec.model,
                    "healthy": engine.healthy,
                    "draining": engine.spec.draining,
                    "version": engine.version,
                    "in_flight": engine.in_flight,
                }
                for engine in self._parts.upstreams.all()
            ],
        }

    async def stop(self) -> None:
        """Take no new requests, let running ones end within the drain time-out, keep what was captured."""
        if self._handler.draining:
            return
        self._handler.draining = True
        self._door.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._handler.idle.wait(), self._parts.settings.drain_timeout)
        await self._door.shutdown()
        if self._peers is not None:
            self._peers.close()
        if self._parts.external is not None:
            await self._parts.external.close()
        await self._parts.journal.close()
        await self._parts.attempts.close()
        await self._parts.versions.close()
        await self._parts.upstreams.close()
        await self._parts.client.close()
        await self._channel.close()

    async def _answer(self, request: Incoming) -> None:
        path = request.target.partition("?")[0]
        if path == STATUS_PATH:
            state = self.describe() if self._peers is None else await self._peers.status()
            request.answer(200, JSON, orjson.dumps(state))
        elif path == "/health":
            well = (
                any(engine.healthy for engine in self._parts.upstreams.all()) and not self._handler.draining
            )
            request.answer(200 if well else 503, (), b"")
        else:
            await self._handler.handle(request)


def url_of(listening: socket.socket) -> str:
    """The root of what is served there."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; no other process can share its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
