"""`agl-grpc grader`: workers that judge sealed attempts as they come."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Annotated

import typer

from agl_grpc_cli.errors import EXIT_USAGE, CliError
from agl_grpc_cli.options import DEFAULT_STORE, LogLevelOption, RunOption, StoreOption

app = typer.Typer(help="Judge sealed attempts with your graders.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Judge sealed attempts with your graders."""


@app.command()
def start(
    graders: Annotated[list[str], typer.Argument(metavar="MODULE:NAME...", help="Graders.")],
    store: StoreOption = DEFAULT_STORE,
    run: RunOption = "default",
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Verdicts under way at once.")] = 16,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes for sync graders; default: processors.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model folder: text of calls of which only tokens are stored."),
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="This worker's share of the attempts, for example 1/2.")
    ] = "1/1",
    patience: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Then another worker's share is taken over.")
    ] = 60.0,
    await_: Annotated[
        bool, typer.Option("--await", help="Have the run wait for these graders from now on.")
    ] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Judge succeeded, sealed attempts of a run, those that are there and those that come; Ctrl-C ends it.

    The worker makes itself a credential that may read its run and put rewards on it, and uses
    nothing else. Attempts that a grader's version has judged are not judged again.

    \b
    Example: agl-grpc grader start my_graders:exact my_graders:style --run maths --await
    """
    from agl_grpc.runner.logs import configure_logging

    place, separator, of = part.partition("/")
    if not (separator and place.isdigit() and of.isdigit() and 1 <= int(place) <= int(of)):
        raise CliError(f"--part {part!r}: write I/N, for example 1/2", exit_code=EXIT_USAGE)
    configure_logging(log_level)
    from agl_grpc_cli.graders import load_decode, load_graders

    chosen = load_graders(graders)
    decode = load_decode(tokenizer)

    async def work() -> None:
        from agl_grpc.client import StoreClient
        from agl_grpc.grader import GraderWorker
        from agl_grpc.model import RunGrader
        from agl_grpc_cli.graders import as_grader

        async with StoreClient(store, run_id=run) as operator:
            if await_:
                named = [RunGrader(g.name, g.version, chosen.weights.get(g.name, 1.0)) for g in chosen]
                await operator.update_run(run, graders=named)
            client = await as_grader(operator, StoreClient)
        async with client:
            worker = GraderWorker(
                client,
                chosen,
                concurrency=concurrency,
                processes=processes,
                decode=decode,
                part=(int(place) - 1, int(of)),
                patience=patience,
            )
            try:
                await worker.open()
                typer.echo(f"grading run {run} with {', '.join(g.id for g in chosen)}", err=True)
                await _until_signal(worker.run())
            finally:
                await worker.close()

    run_graders(work())


def run_graders(work: object) -> None:
    """Runs a coroutine of graders; what cannot be becomes a one-line error."""
    from agl_grpc.client import StoreError
    from agl_grpc.grader import GraderFailed

    try:
        asyncio.run(work)  # type: ignore[arg-type]  # a coroutine
    except (StoreError, GraderFailed) as error:
        raise CliError(str(error)) from error


async def _until_signal(work: object) -> None:
    task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
