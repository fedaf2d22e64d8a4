"""Wait for a condition with a deadline, so that no test sleeps and hopes."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    probe: Callable[[], T | Awaitable[T]], *, within: float = 10.0, what: str = "condition"
) -> T:
    """Returns the first truthy result of ``probe``; after ``within`` seconds fails, naming ``what``."""
    deadline = time.monotonic() + within
    while True:
        result = probe()
        value: T = await result if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within} s; last seen: {value!r}")
        await asyncio.sleep(0.01)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
