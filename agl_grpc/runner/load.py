"""From import paths to the user's objects."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_grpc.agent import LitAgent
    from agl_grpc.tracer import Tracer


class LoadError(Exception):
    """What an import path names cannot be used; the message says why and what to do."""


def load_object(path: str, app_dir: str | None = None) -> Any:
    """The object that `module:name` (or `module:name.attribute`) names.

    `app_dir` is put first on the import path, for modules that are not installed.

    Raises:
        LoadError: the path has another form, the import fails, or the name is not there.
    """
    module_name, separator, attributes = path.partition(":")
    if not module_name or not separator or not attributes:
        raise LoadError(f"{path!r} is not an import path: write module:name, for example my_agent:agent")
    if app_dir is not None and app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise LoadError(_import_failure(module_name, error)) from error
        hint = f" (looked in {app_dir} and the installed packages)" if app_dir else ""
        raise LoadError(f"there is no module {error.name!r}{hint}") from error
    except Exception as error:
        raise LoadError(_import_failure(module_name, error)) from error
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise LoadError(f"module {module_name!r} has no {attributes!r}") from error
    return found


def load_agent(agent: Any, app_dir: str | None = None) -> LitAgent[Any]:
    """The agent that an import path, a class or a factory stands for; an agent stands for itself.

    Raises:
        LoadError: it cannot be imported, or is no agent.
    """
    from agl_grpc.agent import LitAgent

    found = load_object(agent, app_dir) if isinstance(agent, str) else agent
    made = _made(found, LitAgent)
    if not isinstance(made, LitAgent):
        raise LoadError(
            f"the agent {agent!r} is a {type(made).__name__}; it must be a LitAgent, its class, "
            "or a function decorated with @rollout, @llm_rollout or @prompt_rollout"
        )
    return made


def load_hooks(hooks: Iterable[Any], app_dir: str | None = None) -> list[Any]:
    """The hooks that import paths, classes or objects stand for.

    Raises:
        LoadError: one cannot be imported.
    """
    from agl_grpc.runner.hooks import Hook

    found = [load_object(hook, app_dir) if isinstance(hook, str) else hook for hook in hooks]
    return [_made(hook, Hook) for hook in found]


def load_tracer(tracer: Any, app_dir: str | None = None) -> Tracer:
    """The tracer that an import path, a class, a factory or an object stands for; None = an `OtelTracer`.

    Raises:
        LoadError: it cannot be imported, or is no tracer.
    """
    from agl_grpc.tracer import OtelTracer, Tracer

    found = load_object(tracer, app_dir) if isinstance(tracer, str) else tracer
    made = OtelTracer() if found is None else _made(found, Tracer)
    if not isinstance(made, Tracer):
        raise LoadError(
            f"the tracer {tracer!r} is a {type(made).__name__}; it must be a Tracer, or its class"
        )
    return made


def _made(found: Any, kind: type[Any]) -> Any:
    # A class or a factory is called without arguments; an agent may itself be callable.
    if isinstance(found, kind) or not callable(found):
        return found
    if isinstance(found, type) and not issubclass(found, kind):
        return found
    try:
        return found()
    except TypeError:
        return found


def _import_failure(module_name: str, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"importing {module_name!r} failed: {type(error).__name__}: {error}{place}"
