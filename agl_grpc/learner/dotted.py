"""verl's configuration, written nested or dotted: single settings, one over the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; ``{"a": {"b": 1}}``, ``{"a.b": 1}`` and any mixture are the same."""
    if path in config:
        return config[path]
    for at, letter in enumerate(path):
        if letter == "." and isinstance(config.get(path[:at]), Mapping):
            found = setting(config[path[:at]], path[at + 1 :], _MISSING)
            if found is not _MISSING:
                return found
    return default


def expand(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns dotted keys (``"trainer.save_freq": 10``) into the nested form; nested mappings stay as they
    are.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        node = nested
        *parents, leaf = str(key).split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        inner = expand(value) if isinstance(value, Mapping) else value
        if isinstance(inner, dict) and isinstance(node.get(leaf), dict):
            node[leaf] = merged(node[leaf], inner)
        else:
            node[leaf] = inner
    return nested


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


_MISSING = object()
