"""Options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

DEFAULT_DATABASE = "agl-grpc.db"
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


def parse_size(text: str) -> int:
    """Turns `800M`, `4G` or plain bytes into bytes; raises a usage error otherwise."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text, re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"size {text!r}: write bytes, or a number with K, M, G or T")
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Turns `KEY=VALUE` texts into labels; raises a usage error naming the first that is not one."""
    labels: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise typer.BadParameter(f"--label {text!r}: write KEY=VALUE")
        labels[key] = value
    return labels
