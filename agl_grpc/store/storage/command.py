"""A command on its way through the writer."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any, cast

from agl_grpc.store.storage.transaction import Tx

Run = Callable[[Tx], Any]


class Lane(enum.IntEnum):
    """Which queue a command waits in; lifecycle goes first."""

    LIFECYCLE = 0
    SPANS = 1


class Command:
    """What was submitted, and what has become of it.

    Attributes:
        careful: Whether it runs in a savepoint of its own.
        run: Carries it out.
        future: Whoever waits; None = nobody.
        rows: Roughly how many rows it writes.
        lane: Where it waits.
        tx: Set when it has begun.
        result: What `run` returned.
        error: Why it was refused.
    """

    __slots__ = ("careful", "error", "future", "lane", "result", "rows", "run", "tx")

    def __init__(self, run: Run, future: asyncio.Future[Any] | None, rows: int, lane: Lane) -> None:
        self.careful = lane is Lane.SPANS
        self.run = run
        self.future = future
        self.rows = rows
        self.lane = lane
        self.tx: Tx | None = None
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def begun(self) -> Tx:
        """Its transaction, when it has begun."""
        return cast(Tx, self.tx)

    def undone(self) -> None:
        """Its changes came to nothing: tells whoever wants to know."""
        if self.tx is not None:
            for callback in reversed(self.tx.on_rollback):
                callback()
