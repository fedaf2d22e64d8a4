"""`agl-grpc store backup|restore|compact|migrate|verify`: what an operator does to a database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_DATABASE, JsonOption
from agl_grpc_cli.output import print_json

if TYPE_CHECKING:
    from agl_grpc.store.verify.types import Report

T = TypeVar("T")

FileOption = Annotated[str, typer.Option("--database", metavar="PATH", help="The SQLite file.")]
DatabaseOption = Annotated[
    str,
    typer.Option("--database", metavar="PATH|URL", help="The SQLite file, or postgresql://user@host/name."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to `agl-grpc store`."""
    for command in (backup, restore, compact, migrate, verify):
        app.command()(command)


def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The copy.")],
    database: FileOption = DEFAULT_DATABASE,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a database into one file, also while a server uses it."""
    from agl_grpc.store.storage.sqlite import operations

    size = _do(lambda: operations.backup(_sqlite(database), target, force=force))
    _say(as_json, {"file": str(target), "bytes": size}, f"{target}  {size} bytes")


def restore(
    copy: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` made.")],
    database: FileOption = DEFAULT_DATABASE,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a copy in the place of a database that no server has; the copy is verified first.

    With --force a database that is there is kept beside it as NAME.replaced.
    """
    from agl_grpc.store.verify import files

    report = _do(lambda: files.restore(copy, _sqlite(database), force=force))
    if not report.sound:
        _tell(report, copy, as_json)
    _say(as_json, {"database": str(database)}, f"{database}  restored from {copy}")


def compact(database: FileOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Give the space of deleted rows back to the disk; no server may use the database."""
    from agl_grpc.store.storage.sqlite import operations

    sizes = _do(lambda: operations.compact(_sqlite(database)))
    _say(as_json, asdict(sizes), f"{database}  {sizes.before} bytes before, {sizes.after} after")


def migrate(
    database: FileOption = DEFAULT_DATABASE,
    check: Annotated[bool, typer.Option("--check", help="Only say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a database's tables to this version, as a server does when it starts."""
    from agl_grpc.store.storage.schema import families
    from agl_grpc.store.storage.sqlite import operations

    if check:
        before = _do(lambda: operations.versions_of(_sqlite(database)))
        after = {family.name: len(family.migrations) for family in families()}
    else:
        before, after = _do(lambda: operations.bring_up_to_date(_sqlite(database)))
    changed = {name: (before.get(name, 0), version) for name, version in after.items()}
    changed = {name: versions for name, versions in changed.items() if versions[0] != versions[1]}
    if as_json:
        print_json({"before": before, "after": after, "applied": not check})
        return
    for name, (old, new) in changed.items():
        typer.echo(f"{name:<12} {old} -> {new}{'  (not applied)' if check else ''}")
    if not changed:
        typer.echo(f"{database}  is up to date")


def verify(
    database: DatabaseOption = DEFAULT_DATABASE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Keys only: do not read every span and blob.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every invariant of a database and name what breaks it; a server may use it meanwhile."""
    from agl_grpc.store.verify import files

    if "://" in database:
        _tell(_do(lambda: files.verify_postgres(database, deep=not quick)), "", as_json)
    else:
        _tell(_do(lambda: files.verify(Path(database), deep=not quick)), database, as_json)


def _tell(report: Report, database: Path | str, as_json: bool) -> None:
    """Prints a report; a database that is not sound ends the command with exit code 1."""
    if as_json:
        print_json(asdict(report) | {"sound": report.sound})
    else:
        for broken in report.broken:
            typer.echo(f"BROKEN {broken.name}: {broken.says}")
            for row in broken.rows:
                typer.echo(f"  {row}")
            if broken.count > len(broken.rows):
                typer.echo(f"  and {broken.count - len(broken.rows)} more")
        typer.echo(f"{len(report.checked)} invariants checked, {len(report.broken)} broken")
    if not report.sound:
        names = ", ".join(broken.name for broken in report.broken)
        # A URL may hold a password.
        raise CliError(f"{f'database {database}' if database else 'the database'} is damaged: {names}")


def _sqlite(database: str) -> Path:
    if "://" in database:
        raise CliError(
            "this command works on SQLite files; PostgreSQL has its own: pg_dump -Fc -d URL -f FILE to back "
            "up, pg_restore -d URL FILE to restore, VACUUM FULL to compact; a server migrates when it starts"
        )
    return Path(database)


def _do(work: Callable[[], T]) -> T:
    from agl_grpc.store.storage.engine import DatabaseError

    try:
        return work()
    except DatabaseError as error:
        raise CliError(str(error)) from error


def _say(as_json: bool, value: object, text: str) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(text)
