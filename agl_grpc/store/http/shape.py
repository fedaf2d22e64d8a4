"""Reads fields out of JSON objects and queries; what has the wrong shape is named by its path (422)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from agl_grpc.store.http.problems import malformed


class Fields:
    """A JSON object. Fields that nobody asks for are ignored, as the original does.

    Args:
        value: The decoded JSON.
        path: Where it stands in the body; empty = it is the body.
        texts: Whether numbers may come as text, as they do in a query.
    """

    def __init__(self, value: Any, path: str = "", *, texts: bool = False) -> None:
        if not isinstance(value, dict):
            raise malformed(path, "must be a JSON object")
        self.values: dict[str, Any] = value
        self.path = path
        self._texts = texts

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether the field is there, null or not."""
        return name in self.values

    def any(self, name: str) -> Any:
        """A field that must be there, whatever it is."""
        if name not in self.values:
            raise malformed(self.at(name), "is required")
        return self.values[name]

    def text(self, name: str, default: str | None = None) -> str | None:
        """Text, or null."""
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, str):
            raise malformed(self.at(name), "must be text")
        return value

    def required_text(self, name: str) -> str:
        """Text that must be there."""
        self.any(name)
        value = self.text(name)
        if value is None:
            raise malformed(self.at(name), "must be text")
        return value

    def choice(self, name: str, allowed: Collection[str], default: str | None = None) -> str | None:
        """One of some words, or null."""
        value = self.text(name, default)
        if value is not None and value not in allowed:
            raise malformed(self.at(name), f"is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def integer(self, name: str, default: int, least: int = -(2**63), most: int = 2**63 - 1) -> int:
        """A whole number between two."""
        value = self.values.get(name, default)
        if self._texts and isinstance(value, str):
            value = _integer_text(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise malformed(self.at(name), "must be a whole number")
        if not least <= value <= most:
            raise malformed(self.at(name), f"is {value}; it must be between {least} and {most}")
        return value

    def number(self, name: str, least: float = -1e12, most: float = 1e12) -> float | None:
        """A number between two, or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise malformed(self.at(name), "must be a number")
        if not least <= value <= most:
            raise malformed(self.at(name), f"is {value}; it must be between {least:g} and {most:g}")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object, or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise malformed(self.at(name), "must be a JSON object or null")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list, or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise malformed(self.at(name), "must be a list")
        return value

    def text_items(self, name: str, allowed: Collection[str] | None = None) -> list[str] | None:
        """A list of texts, or null."""
        values = self.items(name)
        for place, value in enumerate(values or ()):
            if not isinstance(value, str):
                raise malformed(f"{self.at(name)}[{place}]", "must be text")
            if allowed is not None and value not in allowed:
                rule = f"is {value!r}; it must be one of {', '.join(allowed)}"
                raise malformed(f"{self.at(name)}[{place}]", rule)
        return values

    def fields(self, name: str) -> Fields | None:
        """An object's fields, or None for null."""
        value = self.values.get(name)
        return None if value is None else Fields(value, self.at(name))


def query_fields(query: Iterable[tuple[str, str]], lists: Sequence[str] = ()) -> Fields:
    """A query as fields; a name that is not one of `lists` counts once, the last time."""
    values: dict[str, Any] = {}
    for name, value in query:
        if name in lists:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return Fields(values, texts=True)


def enum_names(enum: Any, prefix: str) -> dict[str, Any]:
    """An enum of the contract by the words that REST uses, its unspecified value left out."""
    return {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}


def _integer_text(value: str) -> Any:
    try:
        return int(value)
    except ValueError:
        return value
