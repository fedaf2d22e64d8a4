"""Entry point of `agl-grpc`."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer

from agl_grpc_cli.errors import EXIT_DEFECT, EXIT_INTERRUPTED, CliError
from agl_grpc_cli.registry import LazyGroup

app = typer.Typer(
    name="agl-grpc",
    cls=LazyGroup,
    help="Train any AI agent with reinforcement learning, gRPC-first.",
    epilog="The store's address is taken from --store, else from AGL_GRPC_STORE, else 127.0.0.1:4747.",
    no_args_is_help=True,
    # rich costs a tenth of a second at each start; plain help is as legible.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from agl_grpc import __version__

        typer.echo(f"agl-grpc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train any AI agent with reinforcement learning, gRPC-first."""


def main() -> NoReturn:
    """Runs the command of `sys.argv` and exits: 0 = well, 1 = failed, 2 = called wrongly, 70 = defect."""
    try:
        app()
    except CliError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong and nobody reads more.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        traceback.print_exc()
        _fail(
            f"a defect in agl-grpc, please report it with the lines above: {type(error).__name__}: {error}",
            EXIT_DEFECT,
        )
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
