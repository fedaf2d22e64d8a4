"""Looks at every invariant of a database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.verify.contents import CONTENTS
from agl_grpc.store.verify.references import REFERENCES
from agl_grpc.store.verify.rules import RULES
from agl_grpc.store.verify.types import Broken, Invariant, Report

INVARIANTS: tuple[Invariant, ...] = (*REFERENCES, *RULES, *CONTENTS)
"""All of them, the quick ones first."""

SHOWN = 20
"""Most rows of a broken invariant that are named."""


def check(
    db: Connection,
    *,
    deep: bool = True,
    before: Sequence[Invariant] = (),
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Checks a database within the caller's read transaction.

    Args:
        db: The connection.
        deep: Whether to read what is stored too.
        before: Checks of the engine's own, made first; if one fails, the rest makes no sense.
        progress: Called with the name of what is looked at next.
    """
    report = Report()
    for invariant in before:
        _look(db, invariant, report, progress)
    if report.broken:
        return report
    for invariant in INVARIANTS:
        if deep or not invariant.deep:
            _look(db, invariant, report, progress)
    return report


def _look(db: Connection, invariant: Invariant, report: Report, progress: Callable[[str], None]) -> None:
    progress(invariant.name)
    report.checked.append(invariant.name)
    rows: Iterable[str] = invariant.find(db)
    broken = Broken(invariant.name, invariant.says)
    for row in rows:
        broken.count += 1
        if len(broken.rows) < SHOWN:
            broken.rows.append(row)
    if broken.count:
        report.broken.append(broken)
