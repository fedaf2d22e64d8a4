"""`agl-grpc train`: training runs, here or by a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agl_grpc_cli import training_runs
from agl_grpc_cli.errors import EXIT_INTERRUPTED, CliError
from agl_grpc_cli.training_runs import PASS_ON, split

app = typer.Typer(help="Train an agent.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train an agent."""


@app.command(context_settings=PASS_ON)
def fit(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The run: YAML, TOML or JSON.", show_default=False)
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration as YAML, and train nothing.")
    ] = False,
) -> None:
    """Train an agent as FILE and `--key value` say: agent, datasets, and what `Trainer` takes.

    \b
    Example:
      agent: my_agent:agent
      train_dataset: tasks/train.jsonl     # or module:name
      algorithm:
        type: apo                          # verl, gepa, module:name, …
        beam_width: 2
      initial_resources:
        prompt: {template: "Answer: {question}"}

    \b
    Any key can be given as an option too, and goes before the file's:
      agl-grpc train fit run.yaml --algorithm.beam_width 4 --n_runners 2 --run_name wide --resume
    """
    from agl_grpc.trainer.config_file import fit_configuration, load_configuration
    from agl_grpc.trainer.errors import TrainerError

    given, arguments = split(config, context.args)
    try:
        configuration = load_configuration(given, arguments)
        if print_config:
            typer.echo(configuration.text, nl=False)
            return
        result = fit_configuration(configuration)
    except TrainerError as error:
        raise CliError(str(error)) from error
    except KeyboardInterrupt:
        raise CliError("interrupted; everything was stopped", exit_code=EXIT_INTERRUPTED) from None
    typer.echo(f"run folder: {result.folder.path}")
    if result.model is not None:
        typer.echo(f"model:      {result.model}")


training_runs.add_commands(app)
