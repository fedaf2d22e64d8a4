"""Attributes with dotted names as the nested data that they were flattened from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def nested(attributes: Mapping[str, Any], prefix: str) -> Any:
    """What stands below ``prefix.``, nested again; an empty dict when nothing does.

    Numbers become places of a list where they run from 0 without gaps, else they stay names.
    """
    root: dict[str, Any] = {}
    start = len(prefix) + 1
    for name, value in attributes.items():
        if not name.startswith(f"{prefix}."):
            continue
        *path, last = name[start:].split(".")
        node = root
        for part in path:
            inner = node.get(part)
            if not isinstance(inner, dict):
                inner = node[part] = {}
            node = inner
        node[last] = value
    return _with_lists(root)


def first_nested(attributes: Mapping[str, Any], prefixes: Iterable[str]) -> Any:
    """What stands below the first of the prefixes that has anything; None when none has."""
    return next((found for prefix in prefixes if (found := nested(attributes, prefix))), None)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {name: _with_lists(value) for name, value in node.items()}
    places = [str(place) for place in range(len(inner))]
    if inner and all(place in inner for place in places):
        return [inner[place] for place in places]
    return inner
