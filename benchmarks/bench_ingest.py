"""Durable span ingest through StreamSpans into a database that holds millions of rows already.

Two client processes, random span ids, the unique key on, 512 live attempts. Peers, in the same run: gRPC's
own server, which acknowledges the same messages without looking at them, and SQLite alone with the same rows,
index and durability. Then the server is killed, and has to serve that database again. Last, SQLite alone
writes rows of mixed attempts into that file.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.database import grown, sqlite_alone
from benchmarks.figures import DATABASE, Row, figure, run
from benchmarks.ingest import Kind, rate_of
from benchmarks.servers import bare_server, folder, store_server

KINDS = {
    "700-byte spans, 100 a message of one attempt": (Kind("spans", 100), ">= 80000"),
    "700-byte spans, 100 a message of 20 attempts": (Kind("spans", 100, 20), ">= 40000"),
    "1,280-token model calls, 16 a message": (Kind("calls", 16), ">= 10000"),
}


def measure(options: argparse.Namespace) -> list[Row]:
    """All figures."""
    rows = []
    with folder() as place:
        database = options.database or place / "store.db"
        size = 0 if options.database else options.rows
        attempts = grown(database, size)
        peers = {}
        with bare_server() as server:
            for kind, _ in KINDS.values():
                peers[kind] = rate_of(server, kind, attempts, options.clients, options.seconds / 2)
        with store_server(database) as server:
            for title, (kind, target) in KINDS.items():
                found = rate_of(server, kind, attempts, options.clients, options.seconds)
                rows.append(
                    figure(
                        f"durable {title}",
                        "/s",
                        found.spans,
                        target,
                        peer=peers[kind].spans,
                        server_cpu_us=found.server_cpu,
                        client_cpu_us=found.client_cpu,
                        peer_cpu_us=peers[kind].server_cpu,
                    )
                )
                if kind.kind == "spans":
                    rows.append(figure(f"server CPU of one of those {title}", "us", found.server_cpu))
            server.process.kill()
        with store_server(database) as server:
            title = f"restart after a kill to serving, {size / 1e6:g} million spans and more"
            rows.append(figure(title, "s", server.starting, "<= 2"))
        if options.database:
            return rows
        alone = sqlite_alone(place / "alone.db", options.seconds / 2)
        rows.append(figure("700-byte rows, SQLite alone, empty at first", "/s", alone))
        alone = sqlite_alone(database, options.seconds / 2, 20)
        rows.append(figure("700-byte rows, 20 attempts a hundred, SQLite alone, in that file", "/s", alone))
    return rows


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            seconds=(4.0, "how long each kind is streamed"),
            clients=(2, "client processes"),
            rows=(2_000_000, "spans in an SQLite file at first"),
            database=DATABASE,
        )
    )
