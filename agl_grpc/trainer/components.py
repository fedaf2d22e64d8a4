"""Components as users give them: an instance, a class, a factory, an import path, or a dict."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from agl_grpc.runner.load import LoadError, load_object
from agl_grpc.trainer.errors import TrainerError

T = TypeVar("T")


def build(
    what: str,
    spec: Any,
    kind: type[T],
    *,
    registry: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T | None:
    """The component that a spec stands for; None stays None.

    Args:
        what: the component's name in messages, for example ``strategy``.
        spec: an instance of ``kind``; its class or a factory; an import path (``module:name`` or
            ``module.name``) or a short name of ``registry``; or a dict with ``type`` and arguments.
        kind: what has to come out.
        registry: short names.
        defaults: arguments for constructors that name them and were not given them.

    Raises:
        TrainerError: the spec cannot be used; says why.
    """
    if spec is None or isinstance(spec, kind):
        return spec
    given: dict[str, Any] = {}
    target = spec
    if isinstance(spec, Mapping):
        given = dict(spec)
        target = given.pop("type", given.pop("name", None))
        if target is None:
            raise TrainerError(
                f"{what}: the dict {dict(spec)!r} has no 'type'; write the class or its import path"
            )
    if isinstance(target, str):
        target = find_component(what, target, registry or {})
    made = target
    if not isinstance(target, kind):
        made = _call(what, target, given, defaults or {})
    if not isinstance(made, kind):
        raise TrainerError(f"{what} must be a {kind.__name__}, and {spec!r} is a {type(made).__name__}")
    return made


def find_component(what: str, path: str, registry: Mapping[str, Any]) -> Any:
    """What a short name or an import path names.

    Raises:
        TrainerError: nothing; the nearest short names are named.
    """
    found = registry.get(path)
    if found is not None and not isinstance(found, str):
        return found
    path = found or path
    dotted = path if ":" in path else ":".join(path.rpartition(".")[::2])
    try:
        return load_object(dotted)
    except LoadError as error:
        near = difflib.get_close_matches(path.lower(), registry, n=1, cutoff=0.5)
        known = f"; short names: {', '.join(registry)}" if registry else ""
        hint = f"; did you mean {near[0]!r}?" if near else known
        raise TrainerError(f"{what} {path!r}: {error}{hint}") from error


def _call(what: str, target: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    if not callable(target):
        raise TrainerError(f"{what}: {target!r} is neither a class nor a factory")
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some built-in types have none
        parameters = {}  # type: ignore[assignment]  # an empty mapping serves as well
    arguments = {name: value for name, value in defaults.items() if name in parameters} | dict(given)
    try:
        return target(**arguments)
    except TypeError as error:
        raise TrainerError(
            f"{what}: {getattr(target, '__name__', target)} cannot be made: {error}"
        ) from error
