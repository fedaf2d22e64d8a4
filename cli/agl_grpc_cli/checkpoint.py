"""`agl-grpc checkpoint`: what a training run saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agl_grpc_cli.errors import CliError
from agl_grpc_cli.output import print_json, print_table

app = typer.Typer(help="List and check a run's checkpoints, and export them for engines and transformers.")

FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A run's folder, its checkpoints, or one checkpoint.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(name="list")
def list_checkpoints(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run, oldest first."""
    from agl_grpc.learner.checkpoints.export import describe, find_checkpoints
    from agl_grpc.learner.errors import LearnerError

    try:
        found = [describe(path) for path in find_checkpoints(folder)]
    except LearnerError as error:
        raise CliError(str(error)) from error
    if as_json:
        print_json(found)
        return
    rows = [
        (each["checkpoint"], each["step"], len(each["batches"]), each["bytes"], _best(each["best_score"]))
        for each in found
    ]
    print_table(
        ("CHECKPOINT", "STEP", "BATCHES", "BYTES", "VALIDATION"), rows, empty=f"no checkpoints in {folder}"
    )


def _best(score: float | None) -> str:
    return "" if score is None else f"best ({score:.3f})"


@app.command()
def verify(folder: FolderArgument) -> None:
    """Check that every file of a checkpoint (the newest, where there are several) is what was saved."""
    from agl_grpc.learner.checkpoints.export import find_checkpoint
    from agl_grpc.learner.checkpoints.integrity import verify as check
    from agl_grpc.learner.errors import LearnerError

    try:
        checkpoint = find_checkpoint(folder)
        files = check(checkpoint)
    except LearnerError as error:
        raise CliError(str(error)) from error
    if not files:
        raise CliError(f"{checkpoint} was saved without digests: nothing can be said of it")
    typer.echo(f"{checkpoint.name}: {files} files are what was saved")


@app.command()
def export(
    folder: FolderArgument,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new or empty folder.")],
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; default: as it was trained.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint's model (the newest, where there are several) in Hugging Face form.

    What it writes is loaded by transformers, by vLLM, and as the model of a new run. --dtype and checkpoints
    that were saved without hf_model need the learner environment.
    """
    from agl_grpc.learner.checkpoints.export import export as write
    from agl_grpc.learner.checkpoints.export import find_checkpoint
    from agl_grpc.learner.errors import LearnerError

    try:
        report = write(find_checkpoint(folder), target, dtype=dtype)
    except LearnerError as error:
        raise CliError(str(error)) from error
    except ModuleNotFoundError as error:
        raise CliError(
            f"--dtype needs the package {error.name}: run this in the learner environment "
            "(`agl-grpc env create learner`)"
        ) from error
    except OSError as error:
        raise CliError(f"{target} cannot be written: {error}") from error
    if as_json:
        print_json(report)
        return
    adapter = ", adapter in lora_adapter" if report["adapter"] else ""
    typer.echo(
        f"{report['checkpoint']} (step {report['step']}) -> {report['target']}: "
        f"{report['dtype']}, {report['bytes']} bytes{adapter}"
    )
