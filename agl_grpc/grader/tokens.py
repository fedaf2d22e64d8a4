"""Token ids to text, for model calls of which only tokens were recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class TokenDecoder:
    """Decodes with a model's `tokenizer.json` (package `tokenizers`); it travels to processes by its path.

    Args:
        path: The file, or the folder that has it.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: there is no such file, or it is no tokenizer.
    """

    def __init__(self, path: Path | str) -> None:
        file = Path(path)
        self._path = file / "tokenizer.json" if file.is_dir() else file
        self._tokenizer: Any = self._load()

    def __call__(self, ids: Sequence[int]) -> str:
        """The text without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def __reduce__(self) -> tuple[Callable[[Path], TokenDecoder], tuple[Path]]:
        return _loaded, (self._path,)

    def _load(self) -> Any:
        from tokenizers import Tokenizer

        if not self._path.exists():
            raise ValueError(f"there is no {self._path}")
        try:
            return Tokenizer.from_file(str(self._path))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{self._path} is no tokenizer: {error}") from error


@functools.cache
def _loaded(path: Path) -> TokenDecoder:
    """The decoder of a file: it comes along with each submission, and is read once in a process."""
    return TokenDecoder(path)
