"""`Trainer`: one call trains an agent, with everything that this needs started and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agl_grpc.agent import LitAgent
from agl_grpc.algorithm import APO, GEPA, VERL, Algorithm, Baseline, BestOfN
from agl_grpc.algorithm.base import FunctionalAlgorithm
from agl_grpc.algorithm.baseline import FastAlgorithm
from agl_grpc.client import StoreClient
from agl_grpc.client.connection import ChannelSource, is_in_process
from agl_grpc.diagnosis import AlarmLimits
from agl_grpc.evaluation import Evaluation, Pass, Sampling
from agl_grpc.grader import Graders
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import settings
from agl_grpc.model import LLM, NamedResources, ProxyLLM, Rollout, RolloutMode
from agl_grpc.runner.lit_agent_runner import LitAgentRunner
from agl_grpc.sample.adapter import Adapter
from agl_grpc.tracer import OtelTracer, Tracer
from agl_grpc.trainer.components import build
from agl_grpc.trainer.dev import dev_algorithm, dev_run
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.evaluation_session import (
    EvaluationSession,
    check_tasks,
    evaluated_model,
    with_answers,
)
from agl_grpc.trainer.files import first_tasks, tasks_of
from agl_grpc.trainer.hybrid_session import HybridSession
from agl_grpc.trainer.local_session import LocalSession
from agl_grpc.trainer.options import EngineOptions, RunnerOptions, ValidationOptions, options
from agl_grpc.trainer.plan import Plan, check_name
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.run_folder import RunFolder
from agl_grpc.trainer.session import Session, run_anywhere, run_to_end
from agl_grpc.trainer.strategy import STRATEGIES, ClientServerExecutionStrategy, ExecutionStrategy
from agl_grpc.trainer.verl_session import VerlSession

_ADDRESS = re.compile(r"(grpcs?://)?([^:/\s]+|\[[0-9a-fA-F:.]+\]):\d+")
TRACERS: Mapping[str, Any] = {"otel": OtelTracer, "agentops": "agl_grpc.tracer:AgentOpsTracer"}
ALGORITHMS: Mapping[str, Any] = {
    "verl": VERL,
    "best_of_n": BestOfN,
    "apo": APO,
    "gepa": GEPA,
    "baseline": Baseline,
}


class Trainer:
    """Trains an agent, from the user's own environment: torch, ray and vLLM stay in theirs.

    Components (``algorithm``, ``runner``, ``strategy``, ``tracer``, ``adapter``) are given as an instance, a
    class, a factory, an import path or a dict ``{"type": …, argument: …}``.

    Args:
        algorithm: `VERL` (or ``{"type": "verl", "config": …}``), or one that runs in this process; None =
            only workers.
        store: ``host:port`` (``grpcs://host:port`` with TLS) of a store that runs, or a client of it, whose
            retry policy and certificates count in this process; None = one is started in the run's folder.
        isolation: where agents run: ``thread`` (in the worker, the default), ``process``, ``command`` or
            ``kubernetes``; as ``isolation`` of ``runner``, which names command and Job template.
        runner: a dict of `RunnerOptions` for worker processes; a `LitAgentRunner` for `dev` and for threads.
        initial_resources: published for agents, by name.
        n_runners: worker processes (or threads).
        max_rollouts: each worker leaves after so many; None = never.
        strategy: ``"cs"`` (processes, the default), ``"shm"`` (threads), or one of their classes.
        tracer: records agents' spans; default an `OtelTracer`. Worker processes make one like it.
        hooks: around rollouts: `Hook` objects or import paths.
        adapter: turns spans into what an algorithm in this process learns from.
        llm_proxy: a dict of `EngineOptions` for the engine that is started; or an endpoint that exists.
        run_name: folder and id of the run; default: the time.
        run_dir: where runs' folders lie.
        resume: continue this run from its last committed checkpoint.
        validation: `ValidationOptions` or a dict of them.
        engine_python: Python of the engine environment; default: ``AGL_GRPC_ENGINE_PYTHON`` or
            ``.venv-engine``.
        learner_python: Python of the learner environment; default: ``AGL_GRPC_LEARNER_PYTHON`` or
            ``.venv-learner``. Where verl starts the engine (``engines.hybrid``), that of the environment
            with both, for engine and learner; default: ``AGL_GRPC_HYBRID_PYTHON`` or ``.venv-hybrid``.
        port: of the store that is started; None = any free one.
        graders: who judges in the agent's place: a grader, several, or several with their weights.
        alarms: `AlarmLimits` or a dict of them, for any algorithm; None = the algorithm's own.
        seed: of task order, initialisation, and requests in training and validation; None = the algorithm's.

    Raises:
        TrainerError: a component cannot be made of what was given.
    """

    def __init__(
        self,
        *,
        algorithm: Any = None,
        store: str | StoreClient | None = None,
        runner: Any = None,
        isolation: str | None = None,
        initial_resources: NamedResources | None = None,
        n_runners: int = 1,
        max_rollouts: int | None = None,
        strategy: Any = None,
        tracer: Any = None,
        hooks: Any = None,
        adapter: Any = None,
        llm_proxy: Any = None,
        run_name: str | None = None,
        run_dir: str | Path = "runs",
        resume: bool = False,
        validation: ValidationOptions | Mapping[str, Any] | None = None,
        engine_python: str | Path | None = None,
        learner_python: str | Path | None = None,
        port: int | None = None,
        graders: Any = None,
        alarms: Any = None,
        seed: int | None = None,
    ) -> None:
        if n_runners < 1:
            raise TrainerError(f"n_runners is {n_runners}; it must be 1 or more")
        self.algorithm = _algorithm(algorithm)
        self.graders = _graders(graders)
        self.alarms = _alarms(alarms)
        if self.alarms is not None and isinstance(self.algorithm, VERL):
            self.algorithm.alarms = self.alarms
        self.strategy: ExecutionStrategy = (
            build("strategy", strategy, ExecutionStrategy, registry=STRATEGIES)
            or ClientServerExecutionStrategy()
        )
        self.tracer = build("tracer", tracer, Tracer, registry=TRACERS)  # type: ignore[type-abstract]  # only looked at
        self.runner_options, self.runner = _runner(runner, self.tracer, max_rollouts)
        if isolation is not None:
            _agree("isolation", isolation, "runner", self.runner_options.isolation or isolation)
            self.runner_options = dataclasses.replace(self.runner_options, isolation=isolation)
        self.adapter = build("adapter", adapter, Adapter)
        self.hooks = (
            list(hooks) if isinstance(hooks, Sequence) and not isinstance(hooks, str) else _one(hooks)
        )
        self.engine, self.llm = _engine(llm_proxy)
        self.store = _address(store)
        if self.store and port:
            raise TrainerError("port is that of a store which is started here, but store names one that runs")
        self.store_client = store if isinstance(store, StoreClient) else None
        self.initial_resources = dict(initial_resources or {})
        if n_runners != 1:
            _agree("n_runners", n_runners, "strategy", self.strategy.n_runners or n_runners)
        self.n_runners = n_runners
        self.max_rollouts = max_rollouts
        self.run_name = check_name(run_name or time.strftime("%Y%m%d-%H%M%S"))
        self.run_dir = Path(run_dir)
        self.resume = resume
        self.validation = options("validation", validation, ValidationOptions)
        if seed is not None:
            self.validation = dataclasses.replace(self.validation, seed=seed)
            if self.algorithm is not None:
                self.algorithm.set_seed(seed)
        self.engine_python = engine_python
        self.learner_python = learner_python
        self.port = port
        self.training_run: tuple[str, str] | None = None
        """The training run of the store to take up, and who takes it; None = `fit` makes one."""
        self.configuration: Mapping[str, Any] = {}
        """The keys of the file that this run comes from, for its manifest."""
        if resume and run_name is None:
            raise TrainerError("resume needs run_name: which run goes on?")

    def fit(
        self,
        agent: Any = None,
        train_dataset: Sequence[Any] | None = None,
        *,
        val_dataset: Sequence[Any] | None = None,
    ) -> FitResult:
        """Trains ``agent``; returns when the algorithm has ended and everything that was started has stopped.

        Args:
            agent: a `LitAgent`, its class, a decorated function, or ``module:name``; importable
                or picklable, because workers are processes; None where a command or a Job is the agent.
            train_dataset: tasks; each item is a JSON value and becomes a rollout's input. Also a path, as a
                configuration file has it.
            val_dataset: tasks of validation; never trained.

        Raises:
            TrainerError: something does not start, ends too early or is given wrongly.
            KeyboardInterrupt: after Ctrl-C, once everything has stopped.
        """
        agent = None if agent is None and self.runner_options.is_agent else _agent(agent)
        train, val = tasks_of("train_dataset", train_dataset), tasks_of("val_dataset", val_dataset)
        self._check_datasets(train, val)
        plan = self._plan(agent, train or (), val)
        if self.training_run is not None:
            training_run_id, trainer_id = self.training_run
            plan = dataclasses.replace(plan, training_run_id=training_run_id, trainer_id=trainer_id)
        with Progress(plan.run_id) as progress:
            return run_to_end(self._session(plan, progress))

    def evaluate(
        self,
        agent: Any,
        dataset: Sequence[Any],
        *,
        checkpoint: str | Path | None = None,
        n: int = 1,
        sampling: Sampling | None = None,
        ks: Sequence[int] = (1,),
        success: float = 1.0,
        weights: Mapping[str, float] | None = None,
        fields: Sequence[str] = (),
        find_answer: str = "",
        name: str = "",
        output: str | Path | None = None,
    ) -> Evaluation:
        """How good a model is: every task is answered ``n`` times, and nothing of it is ever trained.

        Store, engine and workers are started and stopped as by `fit`. With ``resume`` an evaluation that
        was broken off goes on. Report and all numbers are written into the run's folder.

        Args:
            agent: as for `fit`.
            dataset: tasks; each item is a JSON value. A task's ``data_source`` names its source.
            checkpoint: a run's folder, a checkpoint, or a model in Hugging Face form; None = the endpoint
                given as ``llm_proxy``, or what the agent itself uses.
            n: answers for each task.
            sampling: temperature and the like, with the seed of the requests.
            ks: the k of pass@k.
            success: the reward from which an answer is right.
            weights: weights of named rewards, whose sum counts; None = the primary reward.
            fields: keys that every task must have.
            find_answer: ``module:name`` of a function that finds the final answer in a text, for maj@n.
            name: of the model in reports.
            output: folder of the report; None = the run's.

        Raises:
            TrainerError: something does not start, is given wrongly, or no rollout got a reward.
            EvaluationError: a parameter is out of its range.
        """
        check_tasks(dataset, fields)
        evaluated = evaluated_model(checkpoint, self.llm, name)
        wanted = Pass(
            samples=n,
            sampling=sampling or Sampling(),
            ks=tuple(ks),
            success=success,
            weights=dict(weights or {}),
            timeout=self.validation.timeout_seconds,
        )
        wanted = with_answers(wanted, evaluated, find_answer)
        plan = self._plan(_agent(agent), (), dataset)
        with Progress(plan.run_id) as progress:
            target = Path(output) if output is not None else None
            return run_to_end(EvaluationSession(plan, progress, evaluated, wanted, target))

    def dev(
        self,
        agent: Any,
        train_dataset: Sequence[Any] | None = None,
        *,
        val_dataset: Sequence[Any] | None = None,
        limit: int = 3,
    ) -> list[Rollout]:
        """Tries an agent out in this process, on a few tasks and without training; answers the rollouts.

        A `FastAlgorithm`, `Baseline` for example, and a function that is the algorithm are run with the first
        ``limit`` tasks of each dataset. Any other algorithm needs more than this process and is left out:
        ``limit`` tasks of the training dataset are done in mode ``train``, else of the validation dataset in
        mode ``val``, one after the other.

        The store is the one given, else a throw-away one. Resources are ``initial_resources`` and the
        endpoint given as ``llm_proxy``. A failure of the agent is raised, with its traceback.

        Raises:
            TrainerError: there is no task, or the agent failed.
        """
        agent = _agent(agent)
        train, val = (
            first_tasks(name, given, limit)
            for name, given in (("train_dataset", train_dataset), ("val_dataset", val_dataset))
        )
        if train is None and val is None:
            raise TrainerError("dev needs tasks: give train_dataset or val_dataset")
        if isinstance(self.algorithm, FastAlgorithm | FunctionalAlgorithm):
            self._check_datasets(train, val)
            plan = self._plan(agent, train or (), val)
            return dev_algorithm(plan, self.algorithm, self.runner, self.adapter, self)
        resources = dict(self.initial_resources)
        if self.llm is not None:
            resources = {self.engine.resource: self.llm, **resources}
        runner = self.runner or LitAgentRunner(self.tracer)
        tried = _agent_object(agent)
        tried.set_trainer(self)
        return run_anywhere(
            dev_run(
                runner,
                tried,
                train or val or (),
                RolloutMode.TRAIN if train else RolloutMode.VAL,
                resources=resources,
                store=self.store,
                run_id=self.run_name,
                hooks=self.hooks,
            )
        )

    def _check_datasets(self, train: Sequence[Any] | None, val: Sequence[Any] | None) -> None:
        """Refuses datasets that the algorithm, where it runs here, does not take."""
        if self.algorithm is None or not self.strategy.runs_algorithm:
            return
        try:
            self.algorithm.check_datasets(train, val)
        except TypeError as error:
            raise TrainerError(f"{error}: leave it out, or have the algorithm ask for it") from error

    def _plan(self, agent: Any, train: Sequence[Any], val: Sequence[Any] | None) -> Plan:
        strategy = self.strategy
        store, port = self.store, self.port or 0
        of_processes: dict[str, Any] = {}
        runner = self.runner_options
        if strategy.graceful_timeout is not None:
            runner = dataclasses.replace(runner, drain_seconds=strategy.graceful_timeout)
        if isinstance(strategy, ClientServerExecutionStrategy):
            port = port or strategy.store_port
            store = store or strategy.existing_store
            of_processes = {
                "store_host": strategy.server_host,
                "start_method": strategy.start_method,
                "allowed_exit_codes": strategy.allowed_exit_codes,
                "stop_seconds": strategy.terminate_timeout + runner.drain_seconds,
            }
        elif runner.where != "thread":
            raise TrainerError(f"isolation {runner.where} needs worker processes: leave strategy='shm' out")
        if strategy.managed_store is False and not store:
            raise TrainerError("managed_store=False starts no store: give the trainer's store, as host:port")
        plan = Plan(
            graders=self.graders,
            alarms=self.alarms,
            folder=RunFolder(self.run_dir / self.run_name),
            agent=agent,
            train_dataset=train,
            val_dataset=val,
            initial_resources=self.initial_resources,
            store=store,
            store_client=self.store_client,
            store_port=port,
            llm=self.llm,
            engine=self.engine,
            runner=runner,
            validation=self.validation,
            n_runners=strategy.n_runners or self.n_runners,
            max_rollouts=self.max_rollouts,
            hooks=self.hooks,
            engine_python=self.engine_python,
            learner_python=self.learner_python,
            resume=self.resume,
            tracer=self.tracer,
            **of_processes,
            configuration=self.configuration,
        )
        try:
            plan.runner_config(store or "127.0.0.1:1")
        except ValueError as error:
            raise TrainerError(f"runner: {error}") from error
        return plan

    def _session(self, plan: Plan, progress: Progress) -> Session[FitResult]:
        processes = isinstance(self.strategy, ClientServerExecutionStrategy)
        if isinstance(self.algorithm, VERL) and self.strategy.runs_algorithm:
            if not processes:
                raise TrainerError("VERL needs worker processes: leave strategy='shm' out")
            if not plan.train_dataset:
                raise TrainerError("VERL needs train_dataset")
            hybrid = any(each.engines.hybrid for each in self.algorithm.of_each_model().values())
            kind = HybridSession if hybrid else VerlSession
            return kind(plan, progress, self.algorithm, start_workers=self.strategy.runs_workers)
        return LocalSession(plan, progress, self.algorithm, self.strategy, self.runner, self.adapter, self)


def _algorithm(spec: Any) -> Algorithm | None:
    if (
        callable(spec)
        and not isinstance(spec, Algorithm | type)
        and getattr(spec, "__name__", "") != "<lambda>"
    ):
        with contextlib.suppress(TypeError):  # not a function of an algorithm's arguments: a factory
            return FunctionalAlgorithm(spec)
    return build("algorithm", spec, Algorithm, registry=ALGORITHMS)


def _runner(
    spec: Any, tracer: Tracer | None, max_rollouts: int | None
) -> tuple[RunnerOptions, LitAgentRunner | None]:
    if spec is None or isinstance(spec, RunnerOptions) or (isinstance(spec, Mapping) and "type" not in spec):
        return options("runner", spec, RunnerOptions), None
    defaults = {"tracer": tracer, "max_rollouts": max_rollouts}
    return RunnerOptions(), build("runner", spec, LitAgentRunner, defaults=defaults)


def _engine(spec: Any) -> tuple[EngineOptions, LLM | None]:
    if isinstance(spec, LLM):
        return EngineOptions(), spec
    if isinstance(spec, Mapping) and "endpoint" in spec:
        try:
            return EngineOptions(), ProxyLLM(**spec)
        except TypeError as error:
            raise TrainerError(f"llm_proxy: {error}") from error
    return options("llm_proxy", spec, EngineOptions), None


def _address(store: object) -> str:
    if store is None:
        return ""
    if isinstance(store, StoreClient) and not is_in_process(store):
        return store.target
    if isinstance(store, StoreClient | ChannelSource):
        raise TrainerError(
            "store is an in-process store, which only the event loop that opened it can use, and workers "
            "have their own: leave store out, or give the address of a store that `agl-grpc store serve` runs"
        )
    if not isinstance(store, str):
        raise TrainerError(f"store is a {type(store).__name__}: give host:port or a StoreClient")
    if not _ADDRESS.fullmatch(store):
        raise TrainerError(f"store {store!r} is not host:port, for example 127.0.0.1:4747")
    return store


def _agent(agent: Any) -> Any:
    """An import path, or an agent."""
    if isinstance(agent, str | LitAgent):
        return agent
    made = build("agent", agent, LitAgent)
    if made is None:
        raise TrainerError("fit needs an agent: a LitAgent, a decorated function, or module:name")
    return made


def _agent_object(agent: Any) -> LitAgent[Any]:
    made = build("agent", agent, LitAgent)
    assert made is not None, "an agent was given"
    return made


def _agree(name: str, given: Any, other: str, its: Any) -> None:
    if given != its:
        raise TrainerError(f"{name} is {given}, but that of {other} is {its}: say it once")


def _one(hooks: Any) -> list[Any]:
    return [] if hooks is None else [hooks]


def _alarms(given: Any) -> AlarmLimits | None:
    """Limits from whatever stands for them; None = none were given."""
    try:
        return None if given is None else settings("alarms", given, AlarmLimits)
    except ConfigError as error:
        raise TrainerError(str(error)) from error


def _graders(given: Any) -> Graders | None:
    """Graders from whatever stands for them; None = the agent judges itself."""
    if given is None:
        return None
    try:
        return Graders.of(given)
    except (ValueError, TypeError) as error:
        raise TrainerError(f"graders: {error}") from error
