"""What a store keeps of a training run, also when its trainer is killed: facts in a file, one a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Ledger:
    """The facts of one training run, in the order in which its trainers noted them.

    Every life of the run opens the same file. What was noted outlasts the process that noted it, however
    that ends.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, kind: str, *values: Any) -> None:
        """Adds a fact; it is the system's once this returns, not this process's."""
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps([kind, *values]).encode() + b"\n")

    def facts(self, kind: str) -> list[Any]:
        """The values of every fact of a kind."""
        return [values for found, *values in self._lines() if found == kind]

    def _lines(self) -> list[Any]:
        text = self._path.read_text() if self._path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    @property
    def claims(self) -> dict[int, list[list[str]]]:
        """Groups of the batches that are claimed, by step: without what was released."""
        claims: dict[int, list[list[str]]] = {}
        for kind, *values in self._lines():
            if kind == "claimed":
                claims.setdefault(values[0], []).append(values[1])
            elif kind == "released":
                claims = {step: batches for step, batches in claims.items() if step <= values[0]}
        return claims

    @property
    def commits(self) -> list[tuple[str, list[str], int]]:
        """Name, batches and step of every committed checkpoint."""
        return [(name, ids, step) for name, ids, step in self.facts("committed")]

    @property
    def checkpoint(self) -> tuple[str, int]:
        """Name and step of the last committed checkpoint."""
        return (self.commits[-1][0], self.commits[-1][2]) if self.commits else ("", 0)

    def release(self) -> dict[int, list[list[str]]]:
        """Groups of the batches that were claimed after the last checkpoint, by step: they are free again."""
        last = self.checkpoint[1]
        released = {step: batches for step, batches in self.claims.items() if step > last}
        self.note("released", last)
        return released
