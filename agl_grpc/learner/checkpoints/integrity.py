"""Checkpoints that are what was saved: a digest of every file, checked before anything is loaded."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson

from agl_grpc.learner.errors import ConfigError

DIGESTS_FILE = "digests.json"
_AT_ONCE = 4


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILE)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(_digest, paths)
        return {str(path.relative_to(folder)): digest for path, digest in zip(paths, found, strict=True)}


def stamp(folder: Path) -> None:
    """Writes down the SHA-256 of every file below ``folder``."""
    (folder / DIGESTS_FILE).write_bytes(orjson.dumps(_digests(folder), option=orjson.OPT_INDENT_2))


def verify(folder: Path) -> int:
    """Answers how many files are what was stamped, all of them; 0 = the folder has no stamp.

    Raises:
        ConfigError: naming the first file that is missing or another.
    """
    file = folder / DIGESTS_FILE
    if not file.is_file():
        return 0
    stamped: dict[str, str] = orjson.loads(file.read_bytes())
    found = _digests(folder)
    for name, digest in stamped.items():
        if name not in found:
            raise ConfigError(f"checkpoint {folder} is not whole: {name} is missing; use an older checkpoint")
        if found[name] != digest:
            raise ConfigError(
                f"checkpoint {folder} is damaged: {name} is not what was saved; use an older checkpoint"
            )
    return len(stamped)
