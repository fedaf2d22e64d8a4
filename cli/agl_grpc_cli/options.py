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

MaxCallsOption = Annotated[
    int, typer.Option("--max-calls", min=0, metavar="N", help="Most calls of one rollout; 0 = any number.")
]
MaxTokensOption = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        min=0,
        metavar="N",
        help="Most tokens of one rollout, prompts included; 0 = any number.",
    ),
]
MaxConcurrencyOption = Annotated[
    int,
    typer.Option(
        "--max-concurrency",
        min=0,
        metavar="N",
        help="Most calls of one rollout at one time; 0 = any number.",
    ),
]
KeepRawOption = Annotated[
    bool,
    typer.Option("--keep-raw/--no-keep-raw", help="Keep requests and answers as they came and went."),
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
