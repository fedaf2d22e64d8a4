"""What `agl-grpc grader` and `agl-grpc grade` share: graders by their import paths, and their credential."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from agl_grpc_cli.errors import EXIT_USAGE, CliError

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.grader import Grader, Graders
    from agl_grpc.grader.conversation import Decode


def load_graders(paths: list[str]) -> Graders:
    """Graders that import paths stand for: a grader, its class, a factory, or several in a `Graders`."""
    from agl_grpc.grader import Grader, Graders
    from agl_grpc.runner.load import LoadError, load_object

    found: list[Grader] = []
    try:
        for path in paths:
            one = load_object(path, os.getcwd())
            if not isinstance(one, Grader | Graders) and callable(one):
                one = one()
            if isinstance(one, Graders):
                found += one.graders
            elif isinstance(one, Grader):
                found.append(one)
            else:
                raise LoadError(
                    f"{path} is a {type(one).__name__}; it must be a Grader, its class, "
                    "or a function decorated with @grader"
                )
        return Graders(tuple(found))
    except (LoadError, ValueError, TypeError) as error:
        raise CliError(str(error), exit_code=EXIT_USAGE) from error


def load_decode(tokenizer: str | None) -> Decode | None:
    """What turns token ids into text by a `tokenizer.json`; None without one."""
    if tokenizer is None:
        return None
    from agl_grpc.grader.tokens import TokenDecoder

    try:
        return TokenDecoder(tokenizer)
    except (ImportError, OSError, ValueError) as error:
        raise CliError(f"tokenizer {tokenizer!r} cannot be used: {error}", exit_code=EXIT_USAGE) from error


async def as_grader(client: StoreClient, make: Callable[..., StoreClient]) -> StoreClient:
    """A client of the same run that holds a grader's credential and nothing more."""
    credential = await client.create_grader_credential(lifetime_seconds=365 * 24 * 3600.0)
    return make(client.target, run_id=client.run_id, credential=credential)
