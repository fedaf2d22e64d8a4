"""`agl-grpc learner`: verl, fed by a store."""

from __future__ import annotations

from typing import Annotated

import typer

from agl_grpc_cli.errors import EXIT_INTERRUPTED, CliError
from agl_grpc_cli.options import DEFAULT_STORE, StoreOption

app = typer.Typer(help="Run the learner (verl) on samples from a store.")


@app.command()
def learner(
    config: Annotated[
        str, typer.Option("--config", metavar="FILE", help="The run's configuration (JSON or YAML).")
    ],
    store: StoreOption = DEFAULT_STORE,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last committed checkpoint.")
    ] = False,
    sft: Annotated[
        bool, typer.Option("--sft", help="Learn the run's best trajectories instead (supervised).")
    ] = False,
) -> None:
    """Trains on sealed rollouts of a store and publishes weights to its engines. Needs the learner
    environment.
    """
    import dataclasses
    import os

    # Ray forks to start its processes; gRPC's fork handlers only complain about it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from agl_grpc.client import StoreError
    from agl_grpc.learner.errors import LearnerError, StoppedError
    from agl_grpc.learner.run_config import load
    from agl_grpc.sample import SampleError
    from agl_grpc.weights import TransferError

    try:
        loaded = load(config)
        try:
            from agl_grpc.learner.process import run

            run(dataclasses.replace(loaded, resume=loaded.resume or resume), store, sft=sft)
        except ModuleNotFoundError as error:
            raise CliError(
                f"the learner needs the package {error.name}: run it in the learner environment "
                "(`agl-grpc env create learner`) or install agl-grpc[verl]"
            ) from error
    except StoppedError as error:
        raise CliError(str(error), exit_code=EXIT_INTERRUPTED) from error
    except (LearnerError, StoreError, SampleError, TransferError) as error:
        raise CliError(str(error)) from error
