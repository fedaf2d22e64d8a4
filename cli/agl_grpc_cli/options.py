"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_STORE = "127.0.0.1:4747"

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="AGL_GRPC_STORE", metavar="HOST:PORT", help="The store's gRPC address."),
]
RunOption = Annotated[str, typer.Option("--run", metavar="ID", help="The run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
LogLevelOption = Annotated[
    str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
]


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Turns `KEY=VALUE` texts into labels; raises a usage error naming the first that is not one."""
    labels: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise typer.BadParameter(f"--label {text!r}: write KEY=VALUE")
        labels[key] = value
    return labels
