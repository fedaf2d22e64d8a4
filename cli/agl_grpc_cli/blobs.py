"""`agl-grpc blobs`: large inputs and outputs, under the hash of their content."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient

app = typer.Typer(help="Store and read blobs.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Store and read blobs."""


@app.command()
def put(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The file.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Store a file; prints its digest, by which rollouts name it and `get` reads it."""
    digest = with_store(store, "default", lambda client: client.put_blob(file)).digest
    if as_json:
        print_json({"digest": digest, "size": file.stat().st_size})
    else:
        typer.echo(digest)


@app.command()
def get(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="sha256:<64 hex digits>.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; default: standard output.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Read a blob."""

    async def read(client: StoreClient) -> None:
        target = sys.stdout.buffer if output is None else output.open("wb")
        try:
            async for piece in client.read_blob(digest):
                target.write(piece)
            target.flush()
        finally:
            if output is not None:
                target.close()

    try:
        with_store(store, "default", read)
    except OSError as error:
        raise CliError(f"{output} cannot be written: {error.strerror}") from error
