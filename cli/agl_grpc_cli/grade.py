"""`agl-grpc grade`: a finished run's rollouts, graded anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption, parse_labels

if TYPE_CHECKING:
    from agl_grpc.grader import Counts

app = typer.Typer(help="Grade a run's rollouts anew.", no_args_is_help=True)


@app.command()
def grade(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run.")],
    grader: Annotated[list[str], typer.Option(metavar="MODULE:NAME", help="Grader (repeatable).")],
    store: StoreOption = DEFAULT_STORE,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only rollouts with this label.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(metavar="MODE", help="Only train, val or test (repeatable).")
    ] = None,
    rollout: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this rollout (repeatable).")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also what this version of the grader has judged.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Verdicts under way at once.")] = 16,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model folder: text of calls of which only tokens are stored."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Grade a run's succeeded rollouts with another grader or another version of one.

    Verdicts are new revisions of their rewards; batches that were claimed before stay as they are. Started
    again after an interruption it goes on with what is missing. Exits 1 when a grader failed on a rollout.

    \b
    Example: agl-grpc grade maths --grader my_graders:exact_v2 --mode train
    """
    from agl_grpc_cli.grader import run_graders
    from agl_grpc_cli.graders import load_decode, load_graders

    chosen = load_graders(grader)
    decode = load_decode(tokenizer)
    labels = parse_labels(label or [])
    counts: list[Counts] = []

    async def work() -> None:
        from agl_grpc.client import RetryPolicy, StoreClient
        from agl_grpc.client.filters import rollout_filter
        from agl_grpc.grader import GraderWorker
        from agl_grpc_cli.connect import ANSWER_SECONDS
        from agl_grpc_cli.graders import as_grader

        retry = RetryPolicy(timeout=ANSWER_SECONDS)
        async with StoreClient(store, run_id=run, retry=retry) as operator:
            client = await as_grader(operator, StoreClient)
        async with client:
            worker = GraderWorker(client, chosen, concurrency=concurrency, decode=decode, again=again)
            which = rollout_filter(run_id=run, labels=labels, mode_in=mode, rollout_id_in=rollout)
            try:
                await worker.open()
                counts.append(await worker.grade_all(which, _progress))
            finally:
                await worker.close()

    try:
        run_graders(work())
    except ValueError as error:
        from agl_grpc_cli.errors import EXIT_USAGE, CliError

        raise CliError(str(error), exit_code=EXIT_USAGE) from error
    (done,) = counts
    _tell(done, json_)
    if any(name not in ("graded", "cached") for c in done.outcomes.values() for name in c):
        raise typer.Exit(1)


def _progress(done: int, of: int) -> None:
    typer.echo(f"{done}/{of} rollouts", err=True)


def _tell(counts: Counts, as_json: bool) -> None:
    outcomes: dict[str, Any] = {name: dict(counter) for name, counter in counts.outcomes.items()}
    if as_json:
        import json

        typer.echo(json.dumps({"rollouts": counts.attempts, "outcomes": outcomes}))
        return
    typer.echo(f"{counts.attempts} rollouts")
    for name, counter in outcomes.items():
        typer.echo(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counter.items())}")
