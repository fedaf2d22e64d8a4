"""Agents that are written as functions."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from agl_grpc.agent.lit_agent import LitAgent, RolloutRawResult
from agl_grpc.agent.missing import ResourceMissing
from agl_grpc.model.resource import LLM, NamedResources, PromptTemplate, ProxyLLM, Resource
from agl_grpc.model.rollout import AttemptedRollout, Rollout

R = TypeVar("R", bound=Resource)
AgentFunction = Callable[..., Any]

_RESOURCE_PARAMETERS = ("resources", "llm", "prompt_template")


class FunctionalLitAgent(LitAgent[Any]):
    """An agent made of one function, which stays callable as it was written."""

    def __init__(self, function: AgentFunction, parameter: str, *, strip_proxy: bool = True) -> None:
        super().__init__()
        functools.update_wrapper(self, function)
        self._function = function
        self._name = _name_of(function)
        self._parameter = parameter
        self._strip_proxy = strip_proxy
        self._parameters = _parameters_of(function)
        self._is_async = _is_async(function)

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        # The name in the module stands for the agent, not for the function inside it.
        module, name = getattr(self, "__module__", ""), getattr(self, "__qualname__", self._name)
        if import_agent(module, name) is not self:
            raise ValueError(_not_importable(module, name))
        return import_agent, (module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        return self._function(*args, **kwargs)

    def check_resources(self, resources: NamedResources) -> None:
        """Raises `ResourceMissing` where the function asks for a resource that is not among these."""
        kind = {"llm": LLM, "prompt_template": PromptTemplate}.get(self._parameter)
        if kind is not None:
            _first(resources, kind)

    def is_async(self) -> bool:
        """Whether the function is async."""
        return self._is_async

    def rollout(self, task: Any, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Call the function with the task and the resource that it names."""
        if self._is_async:
            raise RuntimeError(f"{self._name} is async; await rollout_async instead")
        result: RolloutRawResult = self._call(task, resources, rollout)
        return result

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Await the function with the task and the resource that it names."""
        if not self._is_async:
            raise RuntimeError(f"{self._name} is not async; call rollout instead")
        result: RolloutRawResult = await self._call(task, resources, rollout)
        return result

    def _call(self, task: Any, resources: NamedResources, rollout: Rollout) -> Any:
        given = {"task": task, "rollout": rollout, self._parameter: self._resource(resources, rollout)}
        positional, named = [], {}
        for name, parameter in self._parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(given.get(name, parameter.default))
            elif name in given:
                named[name] = given[name]
        return self._function(*positional, **named)

    def _resource(self, resources: NamedResources, rollout: Rollout) -> Any:
        match self._parameter:
            case "llm":
                llm = _first(resources, LLM)
                return _strip_proxy(llm, rollout) if self._strip_proxy else llm
            case "prompt_template":
                return _first(resources, PromptTemplate)
        return resources


def import_agent(module: str, name: str) -> Any:
    """Find an agent by its module and name, in a process that it is handed to.

    Raises `ValueError` for agents that no import can find, for example those made inside a function.
    """
    found: Any = importlib.import_module(module)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ValueError(_not_importable(module, name)) from None
    return found


def _not_importable(module: str, name: str) -> str:
    return f"agent {module}:{name} cannot be imported; define it at the top of a module"


@overload
def rollout(function: AgentFunction) -> FunctionalLitAgent: ...
@overload
def rollout(
    function: None = None, *, strip_proxy: bool = True
) -> Callable[[AgentFunction], FunctionalLitAgent]: ...
def rollout(
    function: AgentFunction | None = None, *, strip_proxy: bool = True
) -> FunctionalLitAgent | Callable[[AgentFunction], FunctionalLitAgent]:
    """Make a function an agent: ``(task, llm)``, ``(task, prompt_template)`` or ``(task, resources)``.

    Each may take ``rollout`` too and may be async. Raises `TypeError` for any other signature.
    """
    return _decorate(function, _RESOURCE_PARAMETERS, strip_proxy)


@overload
def llm_rollout(function: AgentFunction) -> FunctionalLitAgent: ...
@overload
def llm_rollout(
    function: None = None, *, strip_proxy: bool = True
) -> Callable[[AgentFunction], FunctionalLitAgent]: ...
def llm_rollout(
    function: AgentFunction | None = None, *, strip_proxy: bool = True
) -> FunctionalLitAgent | Callable[[AgentFunction], FunctionalLitAgent]:
    """Make ``(task, llm)`` or ``(task, llm, rollout)`` an agent; it gets the first `LLM` published.

    ``strip_proxy`` hands over a `ProxyLLM` as a plain `LLM` whose endpoint names the rollout and the attempt.
    """
    return _decorate(function, ("llm",), strip_proxy)


@overload
def prompt_rollout(function: AgentFunction) -> FunctionalLitAgent: ...
@overload
def prompt_rollout(function: None = None) -> Callable[[AgentFunction], FunctionalLitAgent]: ...
def prompt_rollout(
    function: AgentFunction | None = None,
) -> FunctionalLitAgent | Callable[[AgentFunction], FunctionalLitAgent]:
    """Make a function ``(task, prompt_template)`` or ``(task, prompt_template, rollout)`` an agent.

    It gets the first `PromptTemplate` published.
    """
    return _decorate(function, ("prompt_template",), True)


def _decorate(
    function: AgentFunction | None, allowed: tuple[str, ...], strip_proxy: bool
) -> FunctionalLitAgent | Callable[[AgentFunction], FunctionalLitAgent]:
    def decorate(target: AgentFunction) -> FunctionalLitAgent:
        return FunctionalLitAgent(target, _resource_parameter(target, allowed), strip_proxy=strip_proxy)

    return decorate if function is None else decorate(function)


def _resource_parameter(function: AgentFunction, allowed: tuple[str, ...]) -> str:
    forms = " or ".join(f"(task, {resource}) or (task, {resource}, rollout)" for resource in allowed)
    rule = f"cannot be an agent; allowed, sync or async: {forms}"
    if not callable(function):
        raise TypeError(f"{function!r} {rule}")
    call = getattr(type(function), "__call__", None)  # noqa: B004  # the method itself is looked at
    if any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in (function, call)):
        raise TypeError(f"{_name_of(function)} is a generator, which {rule}")
    parameters = _parameters_of(function)
    resources = [candidate for candidate in allowed if candidate in parameters]
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    known = {"task", "rollout", *resources}
    if next(iter(parameters), "") != "task" or len(resources) != 1 or not required <= known:
        raise TypeError(f"{_name_of(function)}({', '.join(parameters)}) {rule}")
    return resources[0]


def _parameters_of(function: AgentFunction) -> dict[str, inspect.Parameter]:
    """Parameters by name; ``*args`` and ``**kwargs`` get nothing."""
    try:
        every = inspect.signature(function).parameters
    except ValueError:  # some built-in functions have none
        return {}
    return {
        name: parameter
        for name, parameter in every.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _is_async(function: AgentFunction) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004  # an object may be an agent too
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)


def _first(resources: NamedResources, kind: type[R]) -> R:
    for resource in resources.values():
        if isinstance(resource, kind):
            return resource
    raise ResourceMissing(f"a {kind.__name__}", resources)


def _strip_proxy(llm: LLM, rollout: Rollout) -> LLM:
    if not isinstance(llm, ProxyLLM):
        return llm
    if not isinstance(rollout, AttemptedRollout):
        raise TypeError(f"rollout {rollout.rollout_id} has no attempt, by which the ProxyLLM's URL is made")
    return llm.with_attempted_rollout(rollout)
