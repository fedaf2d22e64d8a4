"""A store, and workers of this process for algorithms that are run without a trainer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agl_grpc import LitAgent, LitAgentRunner, StoreClient
from agl_grpc.algorithm import Algorithm
from agl_grpc.model import NamedResources
from tests.support.store_process import StoreProcess


@dataclass
class Notes:
    """A reporter that keeps everything."""

    folder: Path | None = None
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def step(self, step: int, metrics: Any, total: int | None = None) -> None:
        self.steps[step] = dict(metrics)

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="session")
def store_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with StoreProcess(tmp_path_factory.mktemp("algorithm") / "store.db") as store:
        yield store.address


@dataclass
class Bench:
    """One run in the store."""

    address: str
    run_id: str

    @contextlib.asynccontextmanager
    async def ready(
        self,
        algorithm: Algorithm,
        agent: LitAgent[Any],
        resources: NamedResources | None = None,
        concurrency: int = 8,
    ) -> AsyncIterator[Notes]:
        """The algorithm may run: it has its store, its resources and workers."""
        stop = threading.Event()
        async with StoreClient(self.address, run_id=self.run_id) as store:
            await store.create_run(self.run_id)
            notes = Notes()
            algorithm.set_store(store)
            algorithm.set_initial_resources(resources)
            algorithm.set_reporter(notes)
            runner = LitAgentRunner(concurrency=concurrency, drain_seconds=1.0)
            async with (
                StoreClient(self.address, run_id=self.run_id) as other,
                runner.run_context(agent=agent, store=other),
            ):
                working = asyncio.create_task(runner.iter(stop))
                try:
                    yield notes
                finally:
                    stop.set()
                    await working


@pytest.fixture
def bench(store_address: str) -> Bench:
    return Bench(store_address, f"run-{uuid.uuid4().hex[:8]}")
