"""`agl-grpc rollouts`: what waits, runs and has ended."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, RunOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Rollout

app = typer.Typer(help="List, show and cancel rollouts.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """List, show and cancel rollouts."""


@app.command("ls")
def list_rollouts(
    store: StoreOption = DEFAULT_STORE,
    run: RunOption = "default",
    status: Annotated[
        list[str] | None, typer.Option(metavar="STATUS", help="Only in this state, repeatable.")
    ] = None,
    group_id: Annotated[str | None, typer.Option("--group", metavar="ID", help="Only of this group.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rollouts, newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List rollouts, newest first."""

    async def read(client: StoreClient) -> list[Rollout]:
        from agl_grpc.client import rollout_filter

        chosen = rollout_filter(run_id=run, status_in=status, group_id_in=[group_id] if group_id else None)
        page = await client.query_rollouts(
            filter=chosen, sort_by="create_time", sort_order="desc", limit=limit
        )
        return list(page)

    rollouts = with_store(store, run, read)
    if as_json:
        print_json([asdict(rollout) for rollout in rollouts])
        return
    rows = [
        (
            rollout.rollout_id,
            rollout.status,
            rollout.mode or "-",
            rollout.attempt_count,
            rollout.group_id or "-",
            _time(rollout.start_time),
            rollout.failure.message if rollout.failure else "",
        )
        for rollout in rollouts
    ]
    headings = ("ROLLOUT", "STATUS", "MODE", "ATTEMPTS", "GROUP", "CREATED", "FAILURE")
    print_table(headings, rows, empty=f"run {run!r} has no such rollouts")


@app.command()
def get(
    rollout_id: Annotated[str, typer.Argument(help="The rollout.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show one rollout: its input, attempts, rewards, and the traceback of a failure."""

    async def read(client: StoreClient) -> dict[str, Any] | None:
        rollout = await client.get_rollout_by_id(rollout_id)
        if rollout is None:
            return None
        return {
            "rollout": asdict(rollout),
            "attempts": [asdict(attempt) for attempt in await client.query_attempts(rollout_id)],
            "rewards": [asdict(reward) for reward in await client.query_rewards([rollout_id])],
        }

    found = with_store(store, "default", read)
    if found is None:
        raise CliError(f"there is no rollout {rollout_id!r} in the store at {store}")
    if as_json:
        print_json(found)
    else:
        _print_rollout(found)


@app.command()
def cancel(
    rollout_ids: Annotated[list[str], typer.Argument(help="The rollouts.")],
    store: StoreOption = DEFAULT_STORE,
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Cancel rollouts; running agents are stopped at once. Finished rollouts stay as they are."""

    async def work(client: StoreClient) -> list[str]:
        return await client.cancel_rollouts(rollout_ids, reason=reason)

    cancelled = with_store(store, "default", work)
    if as_json:
        print_json(cancelled)
        return
    for rollout_id in rollout_ids:
        typer.echo(f"{rollout_id}  {'cancelled' if rollout_id in cancelled else 'not changed'}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _print_rollout(found: dict[str, Any]) -> None:
    rollout = found["rollout"]
    for name in ("rollout_id", "run_id", "status", "mode", "group_id", "queue", "resources_id", "input"):
        typer.echo(f"{name:<14}{rollout[name]}")
    typer.echo(f"{'created':<14}{_time(rollout['start_time'])}")
    for attempt in found["attempts"]:
        worker = attempt["worker_id"] or "-"
        typer.echo(
            f"attempt {attempt['sequence_id']:<6}{attempt['attempt_id']}  {attempt['status']}  {worker}"
        )
        if failure := attempt["failure"]:
            typer.echo(f"  {failure['kind']}: {failure['message']}")
            typer.echo("".join(f"  {line}\n" for line in failure["detail"].splitlines()), nl=False)
    for reward in found["rewards"]:
        typer.echo(f"{'reward':<14}{reward['name']} = {reward['value']:g}")
