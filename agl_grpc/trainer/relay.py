"""Shows what a part writes into its log while it has nothing else to show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 0.25


def end_of(log: Path) -> int:
    """Where the next line of a log will begin, in bytes."""
    return log.stat().st_size if log.exists() else 0


def _read(log: Path, begin: int) -> bytes:
    if not log.exists():
        return b""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read()


async def relay(log: Path, begin: int, show: Callable[[str], bool]) -> None:
    """Hands each whole line that is written after ``begin`` to ``show``, until that answers False.

    A file tells nobody that it has grown: it is looked at four times a second.
    """
    rest = b""
    while True:
        data = _read(log, begin)
        begin += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not show(line.decode(errors="replace").rstrip()):
                return
        await asyncio.sleep(_LOOK_SECONDS)
