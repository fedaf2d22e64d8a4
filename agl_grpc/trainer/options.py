"""What a user may say of the engine, the workers and the validation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agl_grpc.evaluation import Sampling
from agl_grpc.trainer.errors import TrainerError

T = TypeVar("T")

ENGINE_PYTHON = "AGL_GRPC_ENGINE_PYTHON"
LEARNER_PYTHON = "AGL_GRPC_LEARNER_PYTHON"
HYBRID_PYTHON = "AGL_GRPC_HYBRID_PYTHON"
_VARIABLES = {"engine": ENGINE_PYTHON, "learner": LEARNER_PYTHON, "hybrid": HYBRID_PYTHON}


@dataclass(frozen=True)
class EngineOptions:
    """The engine that the trainer starts: `agl-grpc vllm serve`.

    Attributes:
        arguments: more of vLLM's arguments, for example ``["--max-model-len", "2048"]``.
        sampling_parameters: given to agents with the endpoint; ``temperature`` is that of training.
        port: of its HTTP server; 0 = any free one.
        host: address it binds to and is reached at.
        start_seconds: longest time until it serves.
        resource: name under which agents find the endpoint.
        visible_devices: GPUs that the engine may use, such as ``"0,1"``; empty = all.
    """

    arguments: Sequence[str] = ()
    sampling_parameters: Mapping[str, Any] = field(default_factory=dict)
    port: int = 0
    host: str = "127.0.0.1"
    start_seconds: float = 600.0
    resource: str = "main_llm"
    visible_devices: str = ""


@dataclass(frozen=True)
class RunnerOptions:
    """The workers that the trainer starts.

    Attributes:
        concurrency: rollouts that each worker process executes at once.
        lease_seconds: how long a lease lasts without renewal.
        drain_seconds: time for agents to finish when the trainer stops.
        log_level: of the workers' log.
        isolation: where agents run: ``thread`` (in the worker), ``process``, ``command`` or ``kubernetes``;
            empty = ``command`` or ``kubernetes`` where that field is given, else ``thread``.
        command: for isolation ``command``: the shell command that is the agent.
        job_template: for isolation ``kubernetes``: file with the Job that each rollout becomes.
        namespace: for isolation ``kubernetes``; None = that of the cluster's configuration.
    """

    concurrency: int = 16
    lease_seconds: float = 30.0
    drain_seconds: float = 5.0
    log_level: str = "info"
    isolation: str = ""
    command: str = ""
    job_template: str = ""
    namespace: str | None = None

    @property
    def where(self) -> str:
        """The isolation that is meant."""
        implied = "command" if self.command else "kubernetes" if self.job_template else "thread"
        return self.isolation or implied

    @property
    def is_agent(self) -> bool:
        """Whether the program or Job that is named here is the agent."""
        return self.where in ("command", "kubernetes")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation before, during and after training, on the whole validation dataset.

    Attributes:
        samples: answers for each task, sampled; 0 = none.
        greedy: whether to answer each task once at temperature 0 too.
        temperature: of the sampled answers; it is not training's.
        top_p: of the sampled answers; None = the endpoint's.
        max_tokens: longest answer of one call in tokens; None = the endpoint's.
        seed: of the requests' seeds: validations of one run ask the same.
        before: whether to validate before training.
        after: whether to validate after training.
        every: steps between two validations during training; 0 = none. verl's own key
            ``trainer.test_freq`` goes before it.
        every_samples: sampled answers for each task in those.
        keep_best: whether the checkpoint with the best of those scores is saved and never deleted.
        timeout_seconds: longest time of one pass.
    """

    samples: int = 4
    greedy: bool = True
    temperature: float = 1.0
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    before: bool = True
    after: bool = True
    every: int = 20
    every_samples: int = 1
    keep_best: bool = True
    timeout_seconds: float = 1800.0

    def sampling(self, *, greedy: bool = False) -> Sampling:
        """How its answers are sampled."""
        return Sampling(0.0 if greedy else self.temperature, self.top_p, self.max_tokens, self.seed)


def options(what: str, given: T | Mapping[str, Any] | None, kind: type[T]) -> T:
    """Options from an instance, from a dict, or the defaults; TrainerError names what is unknown."""
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TrainerError(f"{what} must be {kind.__name__} or a dict of its fields, not {given!r}")
    try:
        return kind(**given)
    except TypeError as error:
        raise TrainerError(f"{what}: {error}") from error


def find_python(kind: str, given: str | Path | None) -> str:
    """Python of an environment: as given, else from the environment variable, else ``.venv-KIND``.

    Raises:
        TrainerError: there is none; says how to make it.
    """
    variable = _VARIABLES[kind]
    named = str(given) if given else os.environ.get(variable, "")
    path = Path(named or Path(f".venv-{kind}") / "bin" / "python").expanduser()
    if not path.is_file():
        raise TrainerError(
            f"no {kind} environment: {path} does not exist; make it with `agl-grpc env create {kind}`, "
            f"or name its Python by {'engine' if kind == 'engine' else 'learner'}_python or {variable}"
        )
    # Not resolved: a link to the base Python is what makes a virtual environment one.
    return str(path.absolute())
