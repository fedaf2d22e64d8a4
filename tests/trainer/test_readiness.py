"""When an engine has told the store of every call, also of those that its spool had to take meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from agl_grpc.trainer.readiness import captured


async def test_calls_that_went_through_the_spool_are_waited_for_and_no_longer() -> None:
    """Three calls were captured: one is delivered late, two while the store was away."""
    told: list[dict[str, Any]] = [
        {"captured": 3, "delivered": 0, "spooled": 2, "rejected": 0, "spool_waiting": 2},
        {"captured": 3, "delivered": 1, "spooled": 2, "rejected": 0, "spool_waiting": 1},
        {"captured": 3, "delivered": 1, "spooled": 2, "rejected": 0, "spool_waiting": 0},
    ]
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(told[min(asked, len(told) - 1)]).encode()
        asked += 1
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        # Long enough that a wait in vain does not pass.
        assert await captured("127.0.0.1", port, within=3600) == told[-1]
    assert asked == len(told)
