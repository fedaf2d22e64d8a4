"""What commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Prints one JSON document on standard output.

    Arrays become lists, named tuples objects, bytes base64.
    """
    import orjson

    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    typer.echo(orjson.dumps(value, default=_plain, option=options).decode())


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Prints rows under headings, columns aligned; `empty` on standard error when there are none."""
    if not rows:
        typer.echo(empty, err=True)
        return
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(headings), *cells]) for column in range(len(headings))]
    for row in [list(headings), *cells]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
