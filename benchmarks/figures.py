"""What a benchmark prints: rows of figures, and how they are made of many measurements."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many per cent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def figure(
    name: str,
    unit: str,
    value: float,
    target: str = "",
    *,
    peer: float | None = None,
    peer_name: str = "gRPC's own server, storing nothing",
    **more: float,
) -> Row:
    """One row.

    Args:
        name: What was measured.
        unit: Of the value.
        value: The figure.
        target: What it should be.
        peer: The same of the peer, in the same run; None = there is none.
        peer_name: Who that is.
        more: What else is kept in the JSON file.
    """
    row: Row = {"name": name, "unit": unit, "value": value, **more}
    if target:
        row["target"] = target
    if peer is not None:
        row |= {"peer": peer, "peer_name": peer_name}
    return row


DATABASE = ("", "URL of an empty PostgreSQL database; default: an SQLite file")
"""The option of benchmarks that measure either engine."""


def run(
    doc: str | None, measure: Callable[[argparse.Namespace], list[Row]], **options: tuple[Any, str]
) -> int:
    """Reads the command line, measures, prints one JSON object.

    Args:
        doc: The benchmark's description.
        measure: Measures.
        options: Its options: default and help.
    """
    parser = argparse.ArgumentParser(description=doc)
    for name, (default, text) in options.items():
        kind = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    print(json.dumps({"figures": measure(parser.parse_args())}))
    return 0
