"""Commands of `agl-grpc train` on training runs that a worker executes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import EXIT_INTERRUPTED, CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import TrainingRun

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The training run.")]


def split(config: Path | None, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Without a file the first option may have been taken for one."""
    if config is not None and str(config).startswith("--"):
        return None, [str(config), *arguments]
    return config, arguments


def add_commands(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(context_settings=PASS_ON)(start)
    app.command("ls")(list_runs)
    app.command()(show)
    app.command()(watch)
    app.command()(stop)
    app.command()(worker)


def start(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The run, as for `train fit`.", show_default=False)
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Ask for a training run, and print its id; `agl-grpc train worker` executes it.

    FILE and `--key value` are checked here, by what is installed here.
    """
    from agl_grpc.model import TrainingRun
    from agl_grpc.trainer.config_file import load_configuration
    from agl_grpc.trainer.errors import TrainerError

    given, arguments = split(config, context.args)
    try:
        configuration = load_configuration(given, arguments)
    except TrainerError as error:
        raise CliError(str(error)) from error
    data = configuration.data
    run_id = str(data.get("run_name") or time.strftime("%Y%m%d-%H%M%S"))
    named = data.get("algorithm") or "none"
    algorithm = str(named.get("type") if isinstance(named, dict) else named)
    wanted = TrainingRun(
        training_run_id=f"{run_id}-training", run_id=run_id, algorithm=algorithm, config=data
    )

    async def create(client: StoreClient) -> TrainingRun:
        await client.create_run(run_id)
        return await client.create_training_run(wanted)

    typer.echo(with_store(store, run_id, create).training_run_id)


def list_runs(
    run: Annotated[str, typer.Option("--run", metavar="ID", help="Only of this run.")] = "*",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List training runs."""
    runs = with_store(store, "default", lambda client: client.query_training_runs(run_id=run))
    if as_json:
        print_json([asdict(run) for run in runs])
        return
    rows = [
        (item.training_run_id, item.algorithm, item.status.value, item.step, item.trainer_id or "-")
        for item in runs
    ]
    print_table(("ID", "ALGORITHM", "STATUS", "STEP", "TRAINER"), rows, empty="there are no training runs")


def show(training_run_id: IdArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Print a training run as JSON: its state, configuration, failure and result."""
    found = with_store(store, "default", lambda client: client.get_training_run_by_id(training_run_id))
    if found is None:
        raise CliError(f"there is no training run {training_run_id!r} in the store at {store}")
    print_json(asdict(found))


def watch(
    training_run_id: IdArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> None:
    """Show metrics and log of a training run as they come, until it ends.

    Exit code 0 when it succeeded or was stopped, 1 when it failed. With --json a line of JSON for each.
    """
    try:
        ended = with_store(store, "default", lambda client: _follow(client, training_run_id, as_json))
    except KeyboardInterrupt:
        raise CliError("interrupted; the training run goes on", exit_code=EXIT_INTERRUPTED) from None
    if ended is None:
        raise CliError(f"there is no training run {training_run_id!r} in the store at {store}")
    if ended.failure is not None:
        raise CliError(f"{training_run_id} failed: {ended.failure.message}")
    typer.echo(f"{training_run_id} {ended.status.value}", err=as_json)


async def _follow(client: StoreClient, training_run_id: str, as_json: bool) -> TrainingRun | None:
    if await client.get_training_run_by_id(training_run_id) is None:
        return None
    import orjson

    from agl_grpc.trainer.progress import step_line

    async def lines() -> None:
        async for line in client.watch_training_log(training_run_id):
            typer.echo(orjson.dumps({"log": line.text, "time": line.time}) if as_json else line.text)

    reading = asyncio.create_task(lines())
    try:
        async for _, steps in client.watch_training_run(training_run_id):
            for item in steps:
                data = {"step": item.step, "time": item.time, **item.metrics}
                typer.echo(orjson.dumps(data) if as_json else step_line(item.step, None, item.metrics))
        await reading
    finally:
        reading.cancel()
    return await client.get_training_run_by_id(training_run_id)


def stop(
    training_run_id: IdArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for people.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Ask a training run to stop; one that nobody has taken up is stopped at once."""
    run = with_store(store, "default", lambda client: client.stop_training_run(training_run_id, reason))
    typer.echo(f"{run.training_run_id} {run.status.value}")


def worker(
    store: StoreOption = DEFAULT_STORE,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", metavar="DIR", help="Where runs' folders lie.")
    ] = Path("runs"),
    worker_id: Annotated[
        str, typer.Option("--worker-id", metavar="ID", help="Who takes runs up; default: the host's name.")
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="End after one training run.")] = False,
) -> None:
    """Execute training runs that were asked for, one after the other, until Ctrl-C.

    Agents and components are imported from the working directory and from what is installed here. A
    worker that was killed goes on with its run when it starts again under the same id.
    """
    from agl_grpc.trainer.errors import TrainerError
    from agl_grpc.trainer.training_worker import TrainingWorker

    typer.echo(f"waiting for training runs of {store}", err=True)
    try:
        TrainingWorker(store, run_dir, worker_id=worker_id, say=lambda text: typer.echo(text, err=True)).run(
            once=once
        )
    except TrainerError as error:
        raise CliError(str(error)) from error
    except KeyboardInterrupt:
        raise CliError("interrupted; everything was stopped", exit_code=EXIT_INTERRUPTED) from None
