"""What tests know of the database that they run on."""

from __future__ import annotations

from pathlib import Path


def backend_of(database: Path | str | None) -> str:
    """The back end's name in the contract."""
    if database is None:
        return "memory"
    return "sqlite" if isinstance(database, Path) else "postgres"
