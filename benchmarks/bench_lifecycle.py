"""Rollouts through their whole life: a real store on disk, four client processes.

A life is enqueue, lease, span, complete, each durable before its answer. The peer is gRPC's own server with
the same calls of the same clients, in the same run; it stores nothing.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.figures import DATABASE, Row, figure, run
from benchmarks.lives import CLIENTS, LOOPS, Rate, rate_of
from benchmarks.servers import bare_server, folder, store_server

KINDS = {
    "one call a step": (1, LOOPS, ">= 1000"),
    "as a worker: work pushed, spans streamed": (0, LOOPS, ""),
    "32 a call": (32, 2, ">= 2500"),
}


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures, those of the peer beside them."""
    rows = []
    peers: dict[int, Rate] = {}
    with bare_server() as server:
        for batch, loops, _ in KINDS.values():
            if batch:
                peers[batch] = rate_of(server, True, batch, options.seconds / 2, loops=loops)
    with folder() as place, store_server(options.database or place / "store.db") as server:
        for title, (batch, loops, target) in KINDS.items():
            found = rate_of(server, False, batch, options.seconds, loops=loops)
            peer = peers[batch].lives if batch else None
            rows.append(
                figure(
                    f"rollout lives, {title}, {CLIENTS} client processes",
                    "/s",
                    found.lives,
                    target,
                    peer=peer,
                )
            )
            rows.append(figure(f"server CPU of a life, {title}", "us", found.server_cpu))
            rows.append(figure(f"clients' CPU of a life, {title}", "us", found.client_cpu))
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, seconds=(4.0, "length of each measurement"), database=DATABASE))
