"""Everything that a training run is made of, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.diagnosis import AlarmLimits
from agl_grpc.grader import Graders
from agl_grpc.model import LLM, NamedResources, Resource
from agl_grpc.runner.config import RunnerConfig
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.options import EngineOptions, RunnerOptions, ValidationOptions
from agl_grpc.trainer.run_folder import RunFolder

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
VALIDATION_QUEUE_SUFFIX = "-validation"


@dataclass(frozen=True)
class Plan:
    """One run as `Trainer` was told to make it.

    ``store`` is the address of a store that runs already, empty = start one on ``store_host``, and
    ``store_client`` the client of it that was given, whose settings count in this process; ``llm`` an
    endpoint that exists already, None = start an engine; ``start_method`` how worker processes come to be,
    ``allowed_exit_codes`` with what they may leave; ``stop_seconds`` passes between SIGTERM and SIGKILL;
    ``training_run_id`` the training run to take up, empty = one is made, and ``trainer_id`` who takes it;
    ``configuration`` the file's keys, for the manifest; ``alarms`` from when on they are raised.
    """

    folder: RunFolder
    agent: Any
    train_dataset: Sequence[Any]
    val_dataset: Sequence[Any] | None
    initial_resources: NamedResources = field(default_factory=dict)
    store: str = ""
    store_client: StoreClient | None = None
    store_host: str = "127.0.0.1"
    store_port: int = 0
    llm: LLM | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    n_runners: int = 1
    max_rollouts: int | None = None
    hooks: Sequence[Any] = ()
    engine_python: str | Path | None = None
    learner_python: str | Path | None = None
    resume: bool = False
    tracer: Any = None
    start_method: str = "spawn"
    allowed_exit_codes: Sequence[int] = (0,)
    stop_seconds: float = 20.0
    training_run_id: str = ""
    trainer_id: str = ""
    graders: Graders | None = None
    alarms: AlarmLimits | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The run's id in the store."""
        return self.folder.name

    @property
    def validation_queue(self) -> str:
        """Queue of validation rollouts; the workers serve it beside the run's own."""
        return self.run_id + VALIDATION_QUEUE_SUFFIX

    def client(self, store: str) -> StoreClient:
        """A client of the run for this process."""
        if self.store_client is not None:
            return self.store_client.for_run(self.run_id)
        return StoreClient(store, run_id=self.run_id)

    def runner_config(self, store: str) -> RunnerConfig:
        """What the workers are told."""
        return RunnerConfig(
            agent=self.agent,
            store=store,
            workers=self.n_runners,
            concurrency=self.runner.concurrency,
            run_id=self.run_id,
            queues=(self.run_id, self.validation_queue),
            lease_seconds=self.runner.lease_seconds,
            drain_seconds=self.runner.drain_seconds,
            hooks=self.hooks,
            max_rollouts=self.max_rollouts,
            log_level=self.runner.log_level,
            tracer=self.tracer,
            start_method=self.start_method,
            isolation=self.runner.where,
            command=self.runner.command,
            job_template=self.runner.job_template,
            namespace=self.runner.namespace,
            allowed_exit_codes=self.allowed_exit_codes,
        )


def check_name(name: str) -> str:
    """A run's name: it becomes a folder and an id."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise TrainerError(
            f"the run's name {name!r} must be 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return name


def with_endpoints(resources: NamedResources, endpoints: Mapping[str, Resource]) -> NamedResources:
    """The resources with the endpoints first, where agents look for one."""
    return {**endpoints, **{key: value for key, value in resources.items() if key not in endpoints}}
