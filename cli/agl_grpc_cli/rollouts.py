"""`agl-grpc rollouts`: what waits, runs and has ended; cancelled, tried again and deleted by filter."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli import rollout_page
from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.filters import narrow, takes_filter
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Rollout

app = typer.Typer(help="List, show, cancel, retry and delete rollouts.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """List, show, cancel, retry and delete rollouts."""


IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ROLLOUT]...", help="The rollouts.")]
AllOption = Annotated[bool, typer.Option("--all", help="Without conditions: all rollouts of the run.")]


@app.command("ls")
@takes_filter
def list_rollouts(
    chosen: Any,
    store: StoreOption = DEFAULT_STORE,
    sort: Annotated[
        str, typer.Option(metavar="FIELD", help="For example end_time or priority.")
    ] = "create_time",
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest or oldest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most rollouts.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List rollouts, newest first; conditions combine, all have to hold."""

    async def read(client: StoreClient) -> list[Rollout]:
        order = "asc" if ascending else "desc"
        return list(await client.query_rollouts(filter=chosen, sort_by=sort, sort_order=order, limit=limit))

    rollouts = with_store(store, chosen.run_id, read)
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
            f"{rollout.failure.kind}: {rollout.failure.message}" if rollout.failure else "",
        )
        for rollout in rollouts
    ]
    headings = ("ROLLOUT", "STATUS", "MODE", "ATTEMPTS", "GROUP", "CREATED", "FAILURE")
    print_table(headings, rows, empty=f"run {chosen.run_id!r} has no such rollouts")


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


rollout_page.add_commands(app)


@app.command()
@takes_filter
def cancel(
    chosen: Any,
    rollout_ids: IdsArgument = None,
    everything: AllOption = False,
    store: StoreOption = DEFAULT_STORE,
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Cancel rollouts; running agents are stopped at once. Finished rollouts stay as they are."""
    named = rollout_ids or []
    narrow(chosen, named, everything)
    cancelled = with_store(
        store, "default", lambda client: client.cancel_rollouts(filter=chosen, reason=reason)
    )
    if as_json:
        print_json(cancelled)
        return
    for rollout_id in named or cancelled:
        typer.echo(f"{rollout_id}  {'cancelled' if rollout_id in cancelled else 'not changed'}")
    if not named:
        typer.echo(f"{len(cancelled)} cancelled")


@app.command()
@takes_filter
def retry(
    chosen: Any,
    rollout_ids: IdsArgument = None,
    everything: AllOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Make a new rollout for each chosen finished one; `retry_of` names what it tries again."""
    narrow(chosen, rollout_ids or [], everything)
    made = with_store(store, "default", lambda client: client.retry_rollouts(filter=chosen))
    if as_json:
        print_json([{"rollout_id": one.rollout_id, "retry_of": one.retry_of} for one in made])
        return
    for one in made:
        typer.echo(f"{one.rollout_id}  tries {one.retry_of} again")
    typer.echo(f"{len(made)} made")


@app.command()
@takes_filter
def delete(
    chosen: Any,
    rollout_ids: IdsArgument = None,
    everything: AllOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete finished rollouts with all that belongs to them.

    Live, unsealed and claimed ones are kept, and those that a batch pins.
    """
    narrow(chosen, rollout_ids or [], everything)
    work = with_store(store, "default", lambda client: client.delete_rollouts(filter=chosen, dry_run=dry_run))
    deleted, kept = work
    if as_json:
        print_json({"deleted": deleted, "kept": kept, "dry_run": dry_run})
        return
    typer.echo(f"{deleted} {'would be deleted' if dry_run else 'deleted'}, {kept} kept")


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
