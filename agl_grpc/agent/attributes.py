"""Nested values as flat attributes with dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALARS = (str, bool, int, float, bytes)
_DEEPEST = 32
# A span holds 1024; the SDK counts what is more as dropped.
_MOST = 2048


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten mappings and lists: ``{"a": {"b": [1, {"c": 2}]}}`` becomes ``a.b.0`` and ``a.b.1.c``.

    A list of scalars of one type stays one attribute; ``None`` is left out; other objects become text, and so
    does what lies deeper than 32 levels.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        _flatten(str(key), value, flat, 0)
    return flat


def _flatten(name: str, value: Any, flat: dict[str, Any], depth: int) -> None:
    if value is None or len(flat) >= _MOST:
        return
    if isinstance(value, _SCALARS):
        flat[name] = value
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        for key, element in value.items():
            _flatten(f"{name}.{key}", element, flat, depth + 1)
    elif isinstance(value, list | tuple) and depth < _DEEPEST:
        if value and isinstance(value[0], _SCALARS) and len({type(element) for element in value}) == 1:
            flat[name] = list(value)
            return
        for place, element in enumerate(value):
            _flatten(f"{name}.{place}", element, flat, depth + 1)
    else:
        flat[name] = _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    # Whatever an object's own text raises: noting it must not break the agent.
    except Exception as error:
        return f"<{type(value).__name__} whose text cannot be had: {type(error).__name__}>"
