"""`agl-grpc runs`: the scopes of everything: made, changed, paused, resumed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli import run_diff
from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.filters import parse_span
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Run

app = typer.Typer(help="List, make, change, pause and resume runs.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run.")]
QueueOption = Annotated[str, typer.Option("--queue", metavar="NAME", help="Only this queue of it.")]
SPAN = "For example 12h or 30d; `none` = "


@app.callback()
def group() -> None:
    """List, make, change, pause and resume runs."""


@app.command("ls")
def list_runs(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List runs."""
    runs = with_store(store, "default", lambda client: client.query_runs())
    if as_json:
        print_json([asdict(run) for run in runs])
        return
    rows = [(run.run_id, _dispatch(run), _days(run.retention_seconds)) for run in runs]
    print_table(("RUN", "DISPATCH", "RETENTION"), rows, empty="there are no runs")


@app.command()
def get(run_id: RunArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show one run: its rules and how much it holds."""

    async def read(client: StoreClient) -> tuple[Run | None, dict[str, Any]]:
        run = await client.get_run_by_id(run_id)
        return run, await client.statistics(run_id=run_id) if run else {}

    run, statistics = with_store(store, run_id, read)
    if run is None:
        raise CliError(f"there is no run {run_id!r} in the store at {store}")
    if as_json:
        print_json({"run": asdict(run), "statistics": statistics})
        return
    by_status = statistics.pop("rollouts_by_status")
    for name, value in {**asdict(run), **statistics}.items():
        typer.echo(f"{name:<26}{value}")
    for status, count in by_status.items():
        typer.echo(f"{'rollouts ' + status:<26}{count}")


@app.command()
def create(run_id: RunArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Make a run; one that exists is left as it is."""
    _tell(with_store(store, run_id, lambda client: client.create_run(run_id)), as_json)


@app.command()
def update(
    run_id: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    retention: Annotated[
        str | None,
        typer.Option(metavar="AGE", help=f"How long finished rollouts are kept. {SPAN}for ever."),
    ] = None,
    replay_retention: Annotated[
        str | None,
        typer.Option(metavar="AGE", help=f"How long committed batches pin what they name. {SPAN}for ever."),
    ] = None,
    seal_timeout: Annotated[
        str | None,
        typer.Option(metavar="AGE", help=f"How long ended attempts wait for open calls. {SPAN}the default."),
    ] = None,
    self_grading: Annotated[
        bool | None, typer.Option(help="Whether an agent's own credential may write rewards.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change a run's rules; what is not given stays."""
    given: dict[str, Any] = {}
    for name, text in (
        ("retention_seconds", retention),
        ("replay_retention_seconds", replay_retention),
        ("seal_timeout_seconds", seal_timeout),
    ):
        if text is not None:
            given[name] = None if text == "none" else parse_span(text, f"--{name[:-8].replace('_', '-')}")
    if self_grading is not None:
        given["allow_self_grading"] = self_grading
    if not given:
        raise typer.BadParameter("say what to change, for example --retention 30d")
    _tell(with_store(store, run_id, lambda client: client.update_run(run_id, **given)), as_json)


@app.command()
def pause(
    run_id: RunArgument,
    queue: QueueOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Stop delivery of a run's rollouts; what is leased goes on."""
    _tell(with_store(store, run_id, lambda client: client.pause_dispatch(queue=queue)), as_json)


@app.command()
def resume(
    run_id: RunArgument,
    queue: QueueOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Take delivery up again."""
    _tell(with_store(store, run_id, lambda client: client.resume_dispatch(queue=queue)), as_json)


run_diff.add_commands(app)


def _tell(run: Run, as_json: bool) -> None:
    if as_json:
        print_json(asdict(run))
    else:
        typer.echo(f"{run.run_id}  {_dispatch(run)}, rollouts kept {_days(run.retention_seconds)}")


def _dispatch(run: Run) -> str:
    if run.paused:
        return "paused"
    return f"paused in {', '.join(run.paused_queues)}" if run.paused_queues else "running"


def _days(seconds: float | None) -> str:
    return "for ever" if seconds is None else f"{seconds / 86400:g} days"
