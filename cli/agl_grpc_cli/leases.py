"""`agl-grpc leases`: who holds what, and taking it away."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, RunOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

app = typer.Typer(help="List and expire leases.", no_args_is_help=True)

WorkerOption = Annotated[str | None, typer.Option("--worker", metavar="ID", help="Only of this worker.")]


@app.callback()
def group() -> None:
    """List and expire leases."""


@app.command("ls")
def list_leases(
    store: StoreOption = DEFAULT_STORE,
    run: RunOption = "default",
    worker: WorkerOption = None,
    as_json: JsonOption = False,
) -> None:
    """List live leases, oldest first; `--run '*'` = of all runs. Tokens are never shown."""
    leases = with_store(store, run, lambda client: client.query_leases(worker_id=worker, run_id=run))
    if as_json:
        print_json([asdict(lease) for lease in leases])
        return
    now = time.time()
    rows = [
        (
            lease.attempt_id,
            lease.rollout_id,
            lease.worker_id or "-",
            f"{now - lease.grant_time:.0f} s ago",
            f"in {lease.expire_time - now:.0f} s",
        )
        for lease in leases
    ]
    headings = ("ATTEMPT", "ROLLOUT", "WORKER", "GIVEN", "EXPIRES")
    print_table(headings, rows, empty="there are no such leases")


@app.command()
def expire(
    attempt_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ATTEMPT]...", help="The attempts.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    worker: WorkerOption = None,
    as_json: JsonOption = False,
) -> None:
    """End leases now, as if they had run out: the work is delivered elsewhere, its holder is told to stop."""
    if not attempt_ids and not worker:
        raise typer.BadParameter("name attempts, or a worker with --worker")
    ended = with_store(
        store, "default", lambda client: client.expire_leases(attempt_ids or [], worker_id=worker)
    )
    if as_json:
        print_json(ended)
        return
    for attempt_id in ended:
        typer.echo(f"{attempt_id}  expired")
    typer.echo(f"{len(ended)} expired")
