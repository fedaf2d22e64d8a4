"""Single settings of verl's configuration, written nested or dotted."""

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


_MISSING = object()
