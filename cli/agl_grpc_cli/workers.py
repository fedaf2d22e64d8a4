"""`agl-grpc workers`: who executes rollouts, and sending them home."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Worker

app = typer.Typer(help="List workers, and order them to leave.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """List workers, and order them to leave."""


@app.command("ls")
def list_workers(
    store: StoreOption = DEFAULT_STORE,
    status: Annotated[
        list[str] | None, typer.Option(metavar="STATUS", help="Only in this state, repeatable.")
    ] = None,
    contains: Annotated[str | None, typer.Option(metavar="TEXT", help="Only ids with this part.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List workers: state, leases, last sign of life, and why they idle."""

    async def read(client: StoreClient) -> list[Worker]:
        return list(
            await client.query_workers(status_in=status, worker_id_contains=contains, sort_by="worker_id")
        )

    workers = with_store(store, "default", read)
    if as_json:
        print_json([asdict(worker) for worker in workers])
        return
    now = time.time()
    rows = [
        (
            worker.worker_id,
            worker.status,
            worker.lease_count,
            f"{now - worker.last_heartbeat_time:.0f} s ago" if worker.last_heartbeat_time else "never",
            worker.idle_reason or "",
        )
        for worker in workers
    ]
    headings = ("WORKER", "STATUS", "LEASES", "SEEN", "IDLE BECAUSE")
    print_table(headings, rows, empty="the store has heard of no such workers")


@app.command()
def drain(
    worker_ids: Annotated[list[str], typer.Argument(metavar="WORKER...", help="The workers.")],
    store: StoreOption = DEFAULT_STORE,
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Order workers to finish what they hold, take nothing new and leave.

    A worker that is away finds the order when it comes back within 24 hours.
    """
    told = with_store(store, "default", lambda client: client.drain_workers(worker_ids, reason=reason))
    if as_json:
        print_json(told)
        return
    for worker_id in told:
        typer.echo(f"{worker_id}  told to leave")
