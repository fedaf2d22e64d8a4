"""Writes down when something works, and tells afterwards how much of a span of time was worked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Interval = tuple[float, float]


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Adds a line to a file: seconds since the epoch at the beginning and at the end."""
    started = time.time()
    try:
        yield
    finally:
        with path.open("a") as file:
            file.write(f"{started} {time.time()}\n")


def read(path: Path) -> list[Interval]:
    """What was written, in the order of the ends."""
    return [(float(start), float(end)) for start, end in map(str.split, path.read_text().splitlines())]


def within(intervals: list[Interval], start: float, end: float) -> float:
    """Seconds of a span in which at least one of the intervals was under way."""
    covered, reached = 0.0, start
    for begin, stop in sorted(intervals):
        begin, stop = max(begin, reached), min(stop, end)
        if stop > begin:
            covered, reached = covered + stop - begin, stop
    return covered
