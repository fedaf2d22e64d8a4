"""Finds what serves a path: exact ones by a look-up, ones with placeholders segment by segment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

from agl_grpc.store.http.request import Request


@dataclass(frozen=True)
class Answer:
    """What a handler answers: a status, a body (whole, or made while it is sent), its type, more headers."""

    body: bytes | AsyncGenerator[bytes, None] = b""
    status: int = 200
    media_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handler = Callable[[Request], Awaitable[Answer]]


@dataclass
class _Node:
    """Where the paths that begin alike go on."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    fixed: dict[str, _Node] = field(default_factory=dict)
    variable: _Node | None = None


class Found(NamedTuple):
    """What was found for a path.

    Attributes:
        handler: What serves the method there; None = nothing does.
        names: What the route's placeholders stand for.
        allowed: The methods that are served there; empty = the path is unknown.
    """

    handler: Handler | None
    names: Mapping[str, str]
    allowed: frozenset[str]


class Router:
    """Routes such as `/rollouts/{rollout_id}`; a fixed segment wins over a placeholder."""

    def __init__(self) -> None:
        self._root = _Node()
        self._exact: dict[str, _Node] = {}

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Adds a route."""
        node, names = self._root, list[str]()
        for part in path.strip("/").split("/"):
            if part.startswith("{"):
                names.append(part[1:-1])
                node.variable = node = node.variable or _Node()
            else:
                node = node.fixed.setdefault(part, _Node())
        node.handlers[method] = handler
        node.names = tuple(names)
        if not names:
            self._exact[path] = node

    def find(self, method: str, path: str) -> Found:
        """What serves a method at a raw (percent-encoded) path."""
        node = self._exact.get(path)
        if node is not None and method in node.handlers:
            return Found(node.handlers[method], {}, frozenset())
        allowed: set[str] = set()
        for node, values in _walk(self._root, path[1:].split("/"), 0):
            if method in node.handlers:
                names = dict(zip(node.names, map(unquote, values), strict=True))
                return Found(node.handlers[method], names, frozenset())
            allowed.update(node.handlers)
        return Found(None, {}, frozenset(allowed))


def _walk(node: _Node, parts: list[str], place: int) -> Iterator[tuple[_Node, tuple[str, ...]]]:
    """Every node that a path may mean, and what its placeholders are then."""
    if place == len(parts):
        yield node, ()
        return
    part = parts[place]
    fixed = node.fixed.get(part)
    if fixed is not None:
        yield from _walk(fixed, parts, place + 1)
    if node.variable is not None and part:
        for found, values in _walk(node.variable, parts, place + 1):
            yield found, (part, *values)
