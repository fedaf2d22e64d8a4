"""How an algorithm tells what it has come to: metrics of its steps, and lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Reporter(Protocol):
    """Takes what an algorithm reports; calls may come from any thread."""

    @property
    def folder(self) -> Path | None:
        """Where the algorithm may leave files; None = nowhere."""

    def step(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        """Numbers of a finished step (from 1; 0 = before the first), by name; ``total`` steps are planned."""

    def say(self, text: str) -> None:
        """A line for people."""


class SilentReporter:
    """Keeps nothing: for algorithms that run outside a trainer."""

    folder: Path | None = None

    def step(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        """Takes numbers."""

    def say(self, text: str) -> None:
        """Takes a line."""
