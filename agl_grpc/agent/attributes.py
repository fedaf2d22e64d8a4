"""Nested values as flat attributes with dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALARS = (str, bool, int, float, bytes)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten mappings and lists: ``{"a": {"b": [1, {"c": 2}]}}`` becomes ``a.b.0`` and ``a.b.1.c``.

    A list of scalars of one type stays one attribute; ``None`` is left out; other objects become text.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        _flatten(str(key), value, flat)
    return flat


def _flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, _SCALARS):
        flat[name] = value
    elif isinstance(value, Mapping):
        for key, element in value.items():
            _flatten(f"{name}.{key}", element, flat)
    elif isinstance(value, list | tuple):
        if value and isinstance(value[0], _SCALARS) and len({type(element) for element in value}) == 1:
            flat[name] = list(value)
            return
        for place, element in enumerate(value):
            _flatten(f"{name}.{place}", element, flat)
    else:
        flat[name] = str(value)
