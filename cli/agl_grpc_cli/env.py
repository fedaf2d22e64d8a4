"""`agl-grpc env`: the environments of engine and learner."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from agl_grpc_cli.errors import CliError

app = typer.Typer(no_args_is_help=True, help="Create the environments of engine and learner.")


class Kind(enum.StrEnum):
    """Which environment."""

    ENGINE = "engine"
    LEARNER = "learner"
    HYBRID = "hybrid"


class Device(enum.StrEnum):
    """What torch is built for."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.callback()
def environments() -> None:
    """Create the environments of engine and learner."""


@app.command()
def create(
    kind: Annotated[Kind, typer.Argument(help="engine = vLLM, learner = verl, hybrid = both.")],
    path: Annotated[Path | None, typer.Option(help="Folder; default .venv-KIND.")] = None,
    device: Annotated[Device, typer.Option(help="auto = CUDA where an NVIDIA driver answers.")] = Device.AUTO,
    engine: Annotated[
        Path | None,
        typer.Option(help="For hybrid: an engine environment to build upon, so that vLLM is there but once."),
    ] = None,
) -> None:
    """Make a virtual environment for the engine, the learner or both; quick when it is up to date."""
    from agl_grpc.trainer import environment

    folder = (path or Path(f".venv-{kind.value}")).resolve()
    chosen: environment.Device = environment.detect_device()
    if device is not Device.AUTO:
        chosen = "cuda" if device is Device.CUDA else "cpu"
    try:
        environment.create(
            kind.value, folder, chosen, typer.echo, engine=engine.absolute() if engine is not None else None
        )
    except environment.EnvironmentFailed as error:
        raise CliError(str(error)) from error
