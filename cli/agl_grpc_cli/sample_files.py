"""Files of samples, as commands write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from agl_grpc_cli.errors import CliError

if TYPE_CHECKING:
    from agl_grpc.sample import Sample


def write(path: Path, samples: Iterable[Sample], form: str | None = None) -> int:
    """Writes samples in the format that is named, else by the file's ending; returns how many."""
    from agl_grpc.sample.export import write_samples

    try:
        return write_samples(path, samples, form or path.suffix.removeprefix("."))
    except ValueError as error:
        raise CliError(f"{path}: {error}") from error
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise CliError(f"{path} needs {package}: `pip install {package}`, or write .jsonl") from error
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}") from error
