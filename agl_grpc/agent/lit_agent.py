"""The base of agents that are written as classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from agl_grpc.agent.context import current_runner
from agl_grpc.model.resource import NamedResources
from agl_grpc.model.rollout import Rollout
from agl_grpc.model.span import Span, SpanCoreFields

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T = TypeVar("T")

Purpose = Literal["training", "validation"]

# What a rollout may answer: nothing, its reward, several by name, or spans that it recorded by itself.
Spans = Sequence["ReadableSpan"] | Sequence[Span] | Sequence[SpanCoreFields]
RolloutRawResult = float | Mapping[str, float] | Spans | None

_ASYNC_METHODS = ("rollout_async", "training_rollout_async", "validation_rollout_async")


class LitAgent(Generic[T]):
    """An agent: override `rollout` or `rollout_async`, and the training or validation twins if they differ.

    Each gets the task, the resources by name, and the rollout that it works on. ``trained_agents`` names the
    agents of a multi-agent system that are trained (a regular expression); None = all.
    """

    # An agent whose class does not call our __init__ works too.
    trained_agents: str | None = None
    _trainer: weakref.ReferenceType[Any] | None = None
    _runner: weakref.ReferenceType[Any] | None = None

    def __init__(self, *, trained_agents: str | None = None) -> None:
        self.trained_agents = trained_agents

    def __getstate__(self) -> dict[str, Any]:
        # In another process another trainer and runner run it.
        return {key: value for key, value in self.__dict__.items() if key not in ("_trainer", "_runner")}

    def is_async(self) -> bool:
        """Whether any of the async methods is overridden."""
        return any(_overrides(self, name) for name in _ASYNC_METHODS)

    def method_of(self, purpose: Purpose) -> tuple[Callable[..., Any], bool]:
        """The method that does a task in training or in validation, and whether it is async."""
        names = (f"{purpose}_rollout_async", f"{purpose}_rollout", "rollout_async", "rollout")
        name = next((name for name in names if _overrides(self, name)), names[1])
        is_async = self.is_async() if _overrides(self, "is_async") else name.endswith("_async")
        return getattr(self, f"{purpose}_rollout" + "_async" * is_async), is_async

    def set_trainer(self, trainer: Any) -> None:
        """Remember the trainer, weakly."""
        self._trainer = weakref.ref(trainer)

    def get_trainer(self) -> Any:
        """The trainer; `ValueError` when there is none (any more)."""
        return _alive(self._trainer, "trainer")

    @property
    def trainer(self) -> Any:
        """The trainer; see `get_trainer`."""
        return self.get_trainer()

    def set_runner(self, runner: Any) -> None:
        """Remember the runner, weakly."""
        self._runner = weakref.ref(runner)

    def get_runner(self) -> Any:
        """The runner (of several, that of the attempt under way); `ValueError` when there is none."""
        return current_runner() or _alive(self._runner, "runner")

    @property
    def runner(self) -> Any:
        """The runner; see `get_runner`."""
        return self.get_runner()

    def get_tracer(self) -> Any:
        """The runner's tracer."""
        return self.get_runner().tracer

    @property
    def tracer(self) -> Any:
        """The runner's tracer."""
        return self.get_tracer()

    def on_rollout_start(self, task: T, runner: Any, tracer: Any) -> Any:
        """Called, or awaited, before each rollout; an exception is reported and changes nothing."""

    def on_rollout_end(self, task: T, rollout: Rollout, runner: Any, tracer: Any) -> Any:
        """Called, or awaited, after each rollout, however it ended; as `on_rollout_start`."""

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Do the task; answer the reward, or ``None`` when it was emitted, or spans."""
        raise NotImplementedError(_missing(self))

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Do the task; the async twin of `rollout`."""
        raise NotImplementedError(_missing(self))

    def training_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Do the task in training; by default as `rollout`."""
        return self.rollout(task, resources, rollout)

    async def training_rollout_async(
        self, task: T, resources: NamedResources, rollout: Rollout
    ) -> RolloutRawResult:
        """Do the task in training; by default as `rollout_async`."""
        return await self.rollout_async(task, resources, rollout)

    def validation_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Do the task in validation or test; by default as `rollout`."""
        return self.rollout(task, resources, rollout)

    async def validation_rollout_async(
        self, task: T, resources: NamedResources, rollout: Rollout
    ) -> RolloutRawResult:
        """Do the task in validation or test; by default as `rollout_async`."""
        return await self.rollout_async(task, resources, rollout)


def _overrides(agent: LitAgent[Any], name: str) -> bool:
    return getattr(type(agent), name) is not getattr(LitAgent, name)


def _alive(reference: weakref.ReferenceType[Any] | None, what: str) -> Any:
    target = None if reference is None else reference()
    if target is None:
        raise ValueError(f"the agent has no {what}; it is set while a {what} runs it")
    return target


def _missing(agent: LitAgent[Any]) -> str:
    return f"{type(agent).__name__} does not say how to do a task; override rollout or rollout_async"
