"""Keys on the command line: `--algorithm.beam_width 2` says the same as the file's nested keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.files import read_mapping


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value``, ``--a.b=value`` and ``--flag`` (true) as values by dotted key; values are YAML.

    Raises:
        TrainerError: an argument is none of these.
    """
    found: dict[str, Any] = {}
    waiting: str | None = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            if waiting is not None:
                found[waiting] = True
            key, equals, text = argument[2:].partition("=")
            # As options are written elsewhere: --run-name is run_name.
            key = key.replace("-", "_")
            waiting = None if equals else key
            if equals:
                found[key] = _value(text)
        elif waiting is not None:
            found[waiting] = _value(argument)
            waiting = None
        else:
            raise TrainerError(f"{argument!r}: write --key value, for example --algorithm.beam_width 2")
    if waiting is not None:
        found[waiting] = True
    return found


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        # YAML reads 1e-6 as text.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def put(data: dict[str, Any], key: str, value: Any, *, inner: bool = False) -> None:
    """Sets a dotted key in nested mappings; ``inner`` says that ``data`` lies within a component."""
    head, dot, rest = key.partition(".")
    if not dot:
        data[head] = value
        return
    data[head] = as_mapping(data.get(head), inner=inner)
    put(data[head], rest, value, inner=True)


def as_mapping(value: Any, *, inner: bool = False) -> dict[str, Any]:
    """A component as a mapping: a text names its type; within a component it names a file to read."""
    if isinstance(value, Mapping):
        return dict(value)
    if value is None:
        return {}
    return read_mapping(Path(str(value))) if inner else {"type": value}


def numbers(value: Any) -> Any:
    """Nested values with texts such as ``1e-6``, which YAML takes for texts, as the numbers they are."""
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def unknown_key(where: str, key: str, known: Iterable[str]) -> TrainerError:
    """The error for a key that does not exist, with the nearest one that does."""
    names = sorted(known)
    full = f"{where}.{key}" if where else key
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {where + '.' if where else ''}{near[0]}?"
    else:
        hint = f"known here: {', '.join(names)}"
    return TrainerError(f"there is no key {full!r}: {hint}")
