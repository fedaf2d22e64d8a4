"""`agl-grpc train`: a training run described by one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agl_grpc_cli.errors import EXIT_INTERRUPTED, CliError

app = typer.Typer(help="Train an agent.", rich_markup_mode=None, add_completion=False)


@app.command()
def train(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="The run: JSON, TOML, or YAML where PyYAML is.")
    ],
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="The run's name; default: the file's, or the time."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its last committed checkpoint.")
    ] = False,
) -> None:
    """Train an agent as FILE says: agent and datasets by import paths, and what `Trainer` takes.

    \b
    Example (TOML):
      agent = "my_agent:agent"
      train_dataset = "my_agent:train_tasks"     # or a .jsonl file
      val_dataset = "tasks/val.jsonl"
      [algorithm]
      type = "verl"
      config = "verl.yaml"
      [runner]
      concurrency = 32
    """
    from agl_grpc.trainer.config_file import fit_from_file
    from agl_grpc.trainer.errors import TrainerError

    try:
        result = fit_from_file(config, run_name=run, resume=resume)
    except TrainerError as error:
        raise CliError(str(error)) from error
    except KeyboardInterrupt:
        raise CliError("interrupted; everything was stopped", exit_code=EXIT_INTERRUPTED) from None
    typer.echo(f"run folder: {result.folder.path}")
    if result.model is not None:
        typer.echo(f"model:      {result.model}")
