"""The names of Agent Lightning 0.1, kept so that old programs run: they warn, and work on today's store."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from agl_grpc.client import StoreClient
from agl_grpc.model.reading import find_final_reward
from agl_grpc.model.resource import NamedResources, ResourcesUpdate, resource_from_proto
from agl_grpc.model.rollout import Rollout, RolloutConfig
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.http.legacy import REPORT, TRIPLET
from agl_grpc.store.http.rest.resources import resource_of
from agl_grpc.store.http.shape import Fields

log = logging.getLogger(__name__)

_ATTEMPTS = 1000


@dataclass(kw_only=True)
class Task:
    """A task as the legacy routes give it out; times are seconds since the epoch."""

    rollout_id: str
    input: Any
    mode: str | None = None
    resources_id: str | None = None
    create_time: float | None = None
    last_claim_time: float | None = None
    num_claims: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RolloutLegacy:
    """What a legacy client reports of a task; triplets are dicts of ``prompt``, ``response``, ``reward``."""

    rollout_id: str
    task: Task | None = None
    final_reward: float | None = None
    triplets: list[Any] | None = None
    trace: list[dict[str, Any]] | None = None
    logs: list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def _warn(name: str, instead: str) -> None:
    warnings.warn(f"{name} is deprecated; use {instead}", DeprecationWarning, stacklevel=3)


class AgentLightningClient:
    """Polls a server for tasks and reports what came of them; deprecated, use `StoreClient`.

    ``endpoint`` is the HTTP door's URL, ``poll_interval`` and ``timeout`` are in seconds. A request that
    fails answers ``None``, as it always did; the reason is logged.
    """

    def __init__(self, endpoint: str, poll_interval: float = 5.0, timeout: float = 10.0) -> None:
        _warn("AgentLightningClient", "StoreClient")
        self.endpoint = endpoint.rstrip("/")
        self.poll_interval = poll_interval
        self.timeout = timeout
        self.task_count = 0
        self._resources: dict[str, ResourcesUpdate] = {}

    def poll_next_task(self) -> Task | None:
        """The next task; waits until there is one."""
        while (task := self._next_task()) is None:
            time.sleep(self.poll_interval)
        return task

    async def poll_next_task_async(self) -> Task | None:
        """The next task; waits until there is one."""
        while (task := await asyncio.to_thread(self._next_task)) is None:  # noqa: ASYNC110  # HTTP: no push
            await asyncio.sleep(self.poll_interval)
        return task

    def get_resources_by_id(self, resource_id: str) -> ResourcesUpdate | None:
        """A set of resources; ``None`` when it is unknown. A set once read is not read again."""
        if resource_id not in self._resources:
            self._keep(self._request(f"/resources/{quote(resource_id, safe='')}"))
        return self._resources.get(resource_id)

    async def get_resources_by_id_async(self, resource_id: str) -> ResourcesUpdate | None:
        """As `get_resources_by_id`."""
        return await asyncio.to_thread(self.get_resources_by_id, resource_id)

    def get_latest_resources(self) -> ResourcesUpdate | None:
        """The last publication; ``None`` when there is none."""
        return self._keep(self._request("/resources/latest"))

    async def get_latest_resources_async(self) -> ResourcesUpdate | None:
        """As `get_latest_resources`."""
        return await asyncio.to_thread(self.get_latest_resources)

    def post_rollout(self, rollout: RolloutLegacy) -> dict[str, Any] | None:
        """Report what came of a task; the server's answer."""
        answer: dict[str, Any] | None = self._request("/rollout", asdict(rollout))
        return answer

    async def post_rollout_async(self, rollout: RolloutLegacy) -> dict[str, Any] | None:
        """As `post_rollout`."""
        return await asyncio.to_thread(self.post_rollout, rollout)

    def _next_task(self) -> Task | None:
        answer = self._request("/task")
        if not answer or not answer["is_available"]:
            return None
        self.task_count += 1
        return Task(**answer["task"])

    def _keep(self, answer: Any) -> ResourcesUpdate | None:
        if answer is None:
            return None
        named = Fields(answer["resources"])
        resources = {name: resource_from_proto(resource_of(name, named)) for name in named.values}
        update = ResourcesUpdate(**{**answer, "resources": resources})
        self._resources[update.resources_id] = update
        return update

    def _request(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.endpoint + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except (OSError, urllib.error.URLError, ValueError) as error:
            log.warning("%s%s: %s", self.endpoint, path, error)
            return None


class DevTaskLoader(AgentLightningClient):
    """Gives out tasks of its own, one after the other and round again, without a server; deprecated.

    ``tasks`` are inputs or `Task` objects, ``resources`` what agents get with them. What is reported is kept
    in ``rollouts``.
    """

    def __init__(
        self, tasks: Sequence[Any], resources: NamedResources | ResourcesUpdate, **_ignored: Any
    ) -> None:
        _warn("DevTaskLoader", "Trainer.dev")
        if not tasks:
            raise ValueError("DevTaskLoader needs at least one task")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            super().__init__("local://")
        self._tasks = list(tasks)
        self._update = (
            resources
            if isinstance(resources, ResourcesUpdate)
            else ResourcesUpdate(resources_id="local", resources=dict(resources))
        )
        self.rollouts: list[RolloutLegacy] = []

    def _next_task(self) -> Task | None:
        item = self._tasks[self.task_count % len(self._tasks)]
        self.task_count += 1
        if isinstance(item, Task):
            return item
        number = f"local_task_{self.task_count:03d}"
        return Task(
            rollout_id=number, input=item, resources_id=self._update.resources_id, create_time=time.time()
        )

    def get_resources_by_id(self, resource_id: str) -> ResourcesUpdate:
        """The resources; `ValueError` for another id."""
        if resource_id != self._update.resources_id:
            raise ValueError(f"resources {resource_id!r} are unknown; there is {self._update.resources_id!r}")
        return self._update

    def get_latest_resources(self) -> ResourcesUpdate:
        """The resources."""
        return self._update

    def post_rollout(self, rollout: RolloutLegacy) -> dict[str, Any]:
        """Keep what is reported."""
        self.rollouts.append(rollout)
        return {"status": "received", "rollout_id": rollout.rollout_id}


class AgentLightningServer:
    """A throw-away store in this process with the legacy routes; deprecated, use `agl-grpc store serve`.

    ``port`` is that of HTTP. A task that is taken and not reported within ``task_timeout_seconds`` is given
    out again.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8000, task_timeout_seconds: float = 300.0
    ) -> None:
        _warn("AgentLightningServer", "`agl-grpc store serve` and StoreClient")
        self.host, self.port = host, port
        self.endpoint = f"http://{host}:{port}"
        self._timeout = task_timeout_seconds
        self._server: StoreServer | None = None
        self._client: StoreClient | None = None
        self._given: set[str] = set()

    async def start(self) -> None:
        """Serve; returns when requests are answered."""
        config = ServeConfig(host=self.host, port=0, http_port=self.port, database=None)
        self._server = await StoreServer.start(config)
        self.endpoint = self._server.url
        self._client = StoreClient(self._server.address)

    async def stop(self) -> None:
        """Stop; what was not fetched is gone."""
        client, self._client = self._client, None
        server, self._server = self._server, None
        if client is not None:
            await client.close()
        if server is not None:
            await server.stop()

    async def run_forever(self) -> None:
        """Serve until cancelled."""
        await self.start()
        try:
            await asyncio.Event().wait()
        finally:
            await self.stop()

    async def queue_task(
        self,
        sample: Any,
        mode: str | None = None,
        resources_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Enqueue a task; its rollout's id."""
        config = RolloutConfig(
            timeout_seconds=self._timeout, max_attempts=_ATTEMPTS, retry_condition=["timeout"]
        )
        rollout = await self._store.enqueue_rollout(
            sample, mode=mode, resources_id=resources_id, metadata=metadata, config=config
        )
        return rollout.rollout_id

    async def update_resources(self, resources: NamedResources) -> str:
        """Publish resources; their id."""
        return (await self._store.add_resources(resources)).resources_id

    async def get_completed_rollout(self, rollout_id: str) -> RolloutLegacy | None:
        """What was reported of a task, once; ``None`` before it was, and afterwards."""
        ended = await self._store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=0)
        return await self._give(ended[0]) if ended and rollout_id not in self._given else None

    async def poll_completed_rollout(
        self,
        rollout_id: str,
        timeout: float | None = None,  # noqa: ASYNC109  # the original's name
    ) -> RolloutLegacy | None:
        """As `get_completed_rollout`, after waiting for at most so many seconds."""
        await self._store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=timeout)
        return await self.get_completed_rollout(rollout_id)

    async def retrieve_completed_rollouts(self) -> list[RolloutLegacy]:
        """Everything that was reported and not fetched yet."""
        ended = await self._store.query_rollouts(status_in=["succeeded", "failed"])
        return [await self._give(one) for one in ended if one.rollout_id not in self._given]

    async def _give(self, rollout: Rollout) -> RolloutLegacy:
        self._given.add(rollout.rollout_id)
        spans = await self._store.query_spans(rollout.rollout_id, attempt_id="latest")
        made = RolloutLegacy(rollout_id=rollout.rollout_id, final_reward=find_final_reward(spans.items))
        triplets = [json.loads(one.attributes[TRIPLET]) for one in spans.items if one.name == TRIPLET]
        made.triplets = triplets or None
        for span in spans.items:
            if span.name == REPORT:
                for name in ("logs", "metadata", "trace"):
                    if (text := span.attributes.get(f"{REPORT}.{name}")) is not None:
                        setattr(made, name, json.loads(text))
        return made

    @property
    def _store(self) -> StoreClient:
        if self._client is None:
            raise RuntimeError("the server is not running: call start first")
        return self._client
