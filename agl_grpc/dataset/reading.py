"""A dataset from what a user writes: a path, values, an object, or a mapping that also says what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agl_grpc.dataset.errors import DatasetError
from agl_grpc.dataset.jsonl import JsonlTasks
from agl_grpc.dataset.parquet import ParquetTasks
from agl_grpc.dataset.selection import mix, select

_KEYS = ("path", "filter", "require", "deduplicate", "limit", "source")
_MIX_KEYS = ("mix", "size", "seed")


def open_dataset(spec: Any, *, load: Callable[[str], Any] | None = None, name: str = "the dataset") -> Any:
    """Something with ``__len__`` and ``__getitem__``, whose items are read when they are asked for.

    Args:
        spec: a path (``.jsonl``, ``.jsonl.gz``, ``.parquet``, a folder of ``datasets``' ``save_to_disk``);
            ``module:name`` of a dataset or of a function that answers one; a dataset; or a mapping: ``path``
            (any of these) with ``filter``, ``require``, ``deduplicate``, ``limit`` and ``source`` (see
            `select`), or ``mix``: a list of such mappings, each with ``weight``, and ``size`` and ``seed``
            (see `mix`).
        load: finds what ``module:name`` names.
        name: of the dataset, for messages.

    Raises:
        DatasetError: there is no such dataset, it is empty, or a key is unknown.
    """
    if isinstance(spec, Mapping):
        if spec and all(hasattr(value, "column_names") for value in spec.values()):
            raise DatasetError(f"{name} has the splits {', '.join(map(str, spec))}: give one of them")
        return _mixed(spec, load, name) if "mix" in spec else _selected(spec, load, name)
    if isinstance(spec, str | Path):
        spec = _read(str(spec), load, name)
    found = spec() if callable(spec) and not hasattr(spec, "__getitem__") else spec
    if isinstance(found, str | bytes) or not (hasattr(found, "__getitem__") and hasattr(found, "__len__")):
        raise DatasetError(
            f"{name} is a {type(found).__name__}: give a path (.jsonl, .jsonl.gz, .parquet, a saved folder), "
            "module:name, or an object with __len__ and __getitem__"
        )
    if isinstance(found, Mapping):
        return open_dataset(found, load=load, name=name)
    return found


def _read(text: str, load: Callable[[str], Any] | None, name: str) -> Any:
    suffixes = "".join(Path(text).suffixes[-2:])
    if suffixes.endswith((".jsonl", ".jsonl.gz")):
        return JsonlTasks(text)
    if suffixes.endswith(".parquet"):
        return ParquetTasks(text)
    if Path(text).expanduser().is_dir():
        return _saved(text)
    if ":" in text and load is not None:
        return load(text)
    raise DatasetError(f"{name} {text!r}: no .jsonl, .jsonl.gz or .parquet file, no folder, no module:name")


def _saved(path: str) -> Any:
    """A folder that ``save_to_disk`` of the package ``datasets`` has written."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DatasetError(f"{path} needs the package datasets: pip install 'agl-grpc[data]'") from error
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # of many kinds, by what is wrong with which file
        raise DatasetError(f"{path} is no dataset saved to disk: {' '.join(str(error).split())}") from error
    if isinstance(found, Mapping):
        splits = ", ".join(f"{path.rstrip('/')}/{split}" for split in found)
        raise DatasetError(f"{path} has splits: name one of {splits}")
    return found


def _selected(spec: Mapping[str, Any], load: Callable[[str], Any] | None, name: str) -> Any:
    _refuse_unknown(spec, _KEYS, name)
    if "path" not in spec:
        raise DatasetError(f"{name} names no path: {name}: {{path: tasks.jsonl}}")
    tasks = open_dataset(spec["path"], load=load, name=name)
    keep = spec.get("filter")
    # A name is looked up; anything else with a colon, as in a[1:2], is an expression.
    if isinstance(keep, str) and load is not None and _is_name(keep):
        keep = load(keep)
    rules: dict[str, Any] = {"keep": keep, **{key: spec[key] for key in _KEYS[2:] if key in spec}}
    if isinstance(rules.get("require"), str):
        rules["require"] = [rules["require"]]
    if isinstance(rules.get("deduplicate"), str):
        rules["deduplicate"] = [rules["deduplicate"]]
    return select(tasks, **rules, name=str(spec["path"]) if isinstance(spec["path"], str) else name)


def _is_name(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def _mixed(spec: Mapping[str, Any], load: Callable[[str], Any] | None, name: str) -> Any:
    _refuse_unknown(spec, _MIX_KEYS, name)
    parts = []
    for number, part in enumerate(spec["mix"]):
        if not isinstance(part, Mapping):
            raise DatasetError(f"{name}.mix[{number}] must be a mapping with path and weight, not {part!r}")
        inner = {key: value for key, value in part.items() if key not in ("weight", "source")}
        where = f"{name}.mix[{number}]"
        source = str(part.get("source") or (Path(str(part.get("path"))).name.partition(".")[0]))
        parts.append((source, open_dataset(inner, load=load, name=where), float(part.get("weight", 1.0))))
    return mix(parts, size=int(spec.get("size", 0)), seed=int(spec.get("seed", 0)))


def _refuse_unknown(spec: Mapping[str, Any], known: tuple[str, ...], name: str) -> None:
    for key in spec:
        if key not in known:
            raise DatasetError(f"{name} has an unknown key {key!r}; known: {', '.join(known)}")
