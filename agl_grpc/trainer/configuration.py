"""One configuration for a whole run: keys and types are those of the components' constructors.

The parser is made by jsonargparse from the signatures of `Trainer` and of the components that the
configuration names; what it names decides which keys there are.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from agl_grpc.algorithm import VERL
from agl_grpc.algorithm.base import Algorithm
from agl_grpc.model import LLM, NamedResources, PromptTemplate, ProxyLLM, Resource
from agl_grpc.trainer.components import build, find_component
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.learner_keys import LearnerKeys
from agl_grpc.trainer.options import EngineOptions, RunnerOptions, ValidationOptions
from agl_grpc.trainer.overrides import as_mapping, numbers, put, unknown_key
from agl_grpc.trainer.strategy import STRATEGIES
from agl_grpc.trainer.trainer import ALGORITHMS, TRACERS, Trainer

OWN_KEYS = ("agent", "train_dataset", "val_dataset")
_OPTIONS = {"runner": RunnerOptions, "llm_proxy": EngineOptions, "validation": ValidationOptions}
_COMPONENTS: Mapping[str, Mapping[str, Any]] = {
    "algorithm": ALGORITHMS,
    "strategy": STRATEGIES,
    "tracer": TRACERS,
}
# Arguments that are objects of a program: no file can hold them.
_NOT_IN_FILES = {"async_openai_client"}
_UNTYPED = {"adapter", "hooks", "store", "initial_resources"}


@dataclass(frozen=True)
class Configuration:
    """A run that was read and checked: what `Trainer` takes, and what its `fit` takes."""

    trainer: dict[str, Any]
    agent: str
    train_dataset: Any
    val_dataset: Any
    data: dict[str, Any]
    """The keys that were given, as plain values."""
    text: str
    """All keys with their values, defaults included, as YAML."""

    @property
    def resolved(self) -> dict[str, Any]:
        """All keys with their values, defaults included."""
        found: dict[str, Any] = yaml.safe_load(self.text)
        return found

    def make_trainer(self) -> Trainer:
        """The trainer."""
        return Trainer(**self.trainer)


def read_configuration(data: Mapping[str, Any], *, need_agent: bool = True) -> Configuration:
    """Checks nested keys against the signatures of what they name.

    Raises:
        TrainerError: a key is unknown (the nearest is named), a value has the wrong type, a component
            does not exist, or the agent is missing.
    """
    given: dict[str, Any] = numbers(data)
    plain = dict(given)
    own = {key: given.pop(key, None) for key in OWN_KEYS}
    if need_agent and not isinstance(own["agent"], str):
        raise TrainerError("no agent is named: agent: module:name")
    learner = _read_learner_keys(given.pop("learner", None))
    if learner:
        _merge_learner_keys(given, learner)
    parser = ArgumentParser(exit_on_error=False)
    types = _add_groups(parser, given)
    skip = {*_OPTIONS, *_COMPONENTS, *_UNTYPED}
    parser.add_class_arguments(Trainer, None, skip=skip, instantiate=False)
    untyped = {key: given.pop(key) for key in _UNTYPED if key in given}
    _refuse_unknown(parser, given)
    try:
        parsed = parser.parse_object(given)
        made = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise TrainerError(_one_line(error)) from error
    arguments = {**vars(made), **untyped}
    arguments |= {key: value for key, value in types.items() if key not in arguments}
    if "initial_resources" in untyped:
        arguments["initial_resources"] = read_resources(untyped["initial_resources"])
    shown = {**own, **_plain(parser, parsed, types), **untyped}
    text = yaml.safe_dump({k: v for k, v in shown.items() if v is not None}, sort_keys=False)
    return Configuration(arguments, own["agent"] or "", own["train_dataset"], own["val_dataset"], plain, text)


def _add_groups(parser: ArgumentParser, given: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys of each component that is named; answers the names of their types."""
    types: dict[str, Any] = {}
    for key in (*_COMPONENTS, *_OPTIONS):
        spec = given.get(key)
        inner = dict(spec) if isinstance(spec, Mapping) else {}
        named = inner.pop("type", None) if isinstance(spec, Mapping) else spec
        if key in _OPTIONS and named is None:
            kind: Any = ProxyLLM if key == "llm_proxy" and "endpoint" in inner else _OPTIONS[key]
        elif named is None:
            if inner:
                raise TrainerError(f"{key} names no type: {key}: {{type: …}}")
            continue
        else:
            types[key] = named
            kind = find_component(key, str(named), _COMPONENTS.get(key, {}))
        if inspect.isclass(kind):
            parser.add_class_arguments(kind, key, skip=_NOT_IN_FILES & _names(kind))
            given[key] = inner
        elif inner:
            raise TrainerError(f"{key} {named!r} takes no arguments, but has {', '.join(inner)}")
        else:
            given.pop(key)
            types[key] = kind if callable(kind) or isinstance(kind, Algorithm) else named
    return types


def _names(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _refuse_unknown(parser: ArgumentParser, given: Mapping[str, Any]) -> None:
    known = {action.dest for action in parser._actions}
    top = {name.partition(".")[0] for name in known} - {"help"}
    top |= {"learner", *OWN_KEYS, *_UNTYPED, *_COMPONENTS}
    for key, value in given.items():
        if key not in top:
            raise unknown_key("", key, top)
        inside = {name.split(".")[1] for name in known if name.startswith(f"{key}.")} - {"help"}
        for inner in value if inside and isinstance(value, Mapping) else ():
            if inner not in inside:
                raise unknown_key(key, inner, inside)


def _read_learner_keys(given: Any) -> dict[str, Any]:
    """The keys under ``learner`` as verl's own."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TrainerError("learner must be a mapping of keys, for example learner: {lr: 1e-6}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LearnerKeys, "learner")
    _refuse_unknown(parser, {"learner": given})
    try:
        made = parser.instantiate(parser.parse_object({"learner": dict(given)}))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise TrainerError(_one_line(error)) from error
    keys: LearnerKeys = made.learner
    return keys.verl_keys()


def _merge_learner_keys(given: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Puts verl's keys into the algorithm's configuration, before those that are there."""
    algorithm = as_mapping(given.get("algorithm", "verl"))
    kind = find_component("algorithm", str(algorithm.get("type")), ALGORITHMS)
    if not (inspect.isclass(kind) and issubclass(kind, VERL)):
        raise TrainerError(f"learner.* are keys of VERL, but the algorithm is {algorithm.get('type')}")
    config = as_mapping(algorithm.get("config") or {}, inner=True)
    for key, value in keys.items():
        if key in config:
            config[key] = value
        else:
            put(config, key, value, inner=True)
    given["algorithm"] = {**algorithm, "config": config}


def read_resources(spec: Any) -> NamedResources:
    """Resources from mappings: ``template`` or ``template_file`` makes a prompt, ``endpoint`` a model.

    Raises:
        TrainerError: one cannot be made.
    """
    if not isinstance(spec, Mapping):
        raise TrainerError("initial_resources must be a mapping of names to resources")
    return {str(name): _resource(str(name), fields) for name, fields in spec.items()}


def _resource(name: str, spec: Any) -> Resource:
    what = f"initial_resources.{name}"
    if not isinstance(spec, Mapping) or "type" in spec:
        made = build(what, spec, Resource)
        assert made is not None
        return made
    fields = dict(spec)
    try:
        if "template_file" in fields:
            fields["template"] = Path(fields.pop("template_file")).expanduser().read_text()
        if "template" in fields:
            return PromptTemplate(**fields)
        return (ProxyLLM if fields.pop("proxy", True) else LLM)(**fields)
    except OSError as error:
        raise TrainerError(f"{what}: the template cannot be read: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise TrainerError(f"{what}: {error}") from error


def _plain(parser: ArgumentParser, parsed: Namespace, types: Mapping[str, Any]) -> dict[str, Any]:
    """What was parsed as plain values, each component with its type first."""
    data: dict[str, Any] = yaml.safe_load(parser.dump(parsed, skip_validation=True)) or {}
    for key, named in types.items():
        name = named if isinstance(named, str) else _path_of(named)
        data[key] = {"type": name, **data[key]} if isinstance(data.get(key), dict) else name
    return data


def _path_of(found: Any) -> str:
    return f"{getattr(found, '__module__', '?')}:{getattr(found, '__qualname__', type(found).__name__)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("error: ")
