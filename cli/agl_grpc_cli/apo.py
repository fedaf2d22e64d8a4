"""`agl-grpc apo`: what prompt optimisation has done, from the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_database, with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.algorithm.prompt.journal import AlgorithmRecord
    from agl_grpc.client import StoreClient

app = typer.Typer(help="Look at prompt optimisation: versions, critiques, scores.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its folder.")]
AlgorithmOption = Annotated[
    str, typer.Option("--algorithm", metavar="NAME", help="apo or gepa; default: either.")
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="AGL_GRPC_STORE",
        metavar="HOST:PORT",
        help="The store's gRPC address; default: the run's own database if it is here, else 127.0.0.1:4747.",
    ),
]


@app.callback()
def group() -> None:
    """Look at prompt optimisation: versions, critiques, scores."""


@app.command()
def history(
    run: RunArgument,
    prompts: Annotated[bool, typer.Option("--prompts", help="Show prompts and critiques in full.")] = False,
    algorithm: AlgorithmOption = "",
    store: WhereOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every prompt version of a run with its parent, its scores and what the critic took."""
    records = _records(run, algorithm, store)
    if as_json:
        print_json([{"kind": record.kind, "key": record.key, **record.data} for record in records])
        return
    from agl_grpc.algorithm.prompt.history import version_rows

    headings = ("VERSION", "PARENT", "CHANGED", "SCORE", "FULL", "TOKENS", "NOTE")
    print_table(headings, version_rows(records), empty=f"run {run!r} has no prompt versions yet")
    if prompts:
        for record in records:
            _show(record)
    for record in records:
        if record.kind == "end":
            typer.echo(f"best: {record.data['best']} with {record.data['score']:.3f}")


@app.command()
def best(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Write a file for each prompt here."),
    ] = None,
    algorithm: AlgorithmOption = "",
    store: WhereOption = None,
) -> None:
    """Print the best prompts of a run, or write them to files."""
    from agl_grpc.algorithm.prompt.history import best_candidate

    found = best_candidate(_records(run, algorithm, store))
    if found is None:
        raise CliError(f"run {run!r} has no scored prompt yet")
    for name, template in found.templates.items():
        if output is None:
            typer.echo(f"--- {name} ({found.version}, {template.engine})\n{template.template}")
            continue
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.txt").write_text(template.template)
        typer.echo(str(output / f"{name}.txt"))


def _records(run: str, algorithm: str, store: str | None) -> list[AlgorithmRecord]:
    from agl_grpc.algorithm.prompt.journal import journal_id, read_records

    names = [algorithm] if algorithm else ["apo", "gepa"]
    run_id = Path(run).name

    async def read(client: StoreClient) -> list[AlgorithmRecord]:
        for name in names:
            if found := await read_records(client, journal_id(run_id, name)):
                return found
        return []

    databases = [] if store else [folder / "agl.db" for folder in (Path(run), Path("runs") / run)]
    database = next((path for path in databases if path.is_file()), None)
    address = store or DEFAULT_STORE
    found = with_store(address, run_id, read) if database is None else with_database(database, run_id, read)
    if not found:
        raise CliError(f"run {run_id!r} has no history of {' or '.join(names)} in {database or address}")
    return found


def _show(record: AlgorithmRecord) -> None:
    data = record.data
    if record.kind == "critique":
        typer.echo(
            f"\n--- critique of {data['parent']} ({data['changed']}), for {data['version']}\n{data['text']}"
        )
    elif record.kind == "candidate":
        for name, template in data["templates"].items():
            if data["changed"] in (None, name):
                typer.echo(f"\n--- {data['version']}: {name}\n{template['template']}")
