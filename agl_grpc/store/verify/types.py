"""What a check is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agl_grpc.store.storage.engine import Connection


@dataclass(frozen=True)
class Invariant:
    """Something that holds in every sound database.

    Attributes:
        name: Its short name, for example `attempts.lease`.
        says: What holds, as a sentence.
        find: The rows that break it, one line each.
        deep: Whether it reads what is stored, not only keys: slow with many spans.
    """

    name: str
    says: str
    find: Callable[[Connection], Iterable[str]]
    deep: bool = False


@dataclass
class Broken:
    """An invariant that does not hold: its name, what it says, the first rows and how many there are."""

    name: str
    says: str
    rows: list[str] = field(default_factory=list)
    count: int = 0


@dataclass
class Report:
    """What a check of a database found.

    Attributes:
        checked: Names of the invariants that were looked at, in order.
        broken: Those that do not hold.
    """

    checked: list[str] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether all of them hold."""
        return not self.broken


def by_sql(name: str, says: str, row: str, sql: str) -> Invariant:
    """An invariant that a query checks: it answers the rows that break it, `row` says them."""

    def find(db: Connection) -> Iterable[str]:
        for values in db.execute(sql):
            yield row.format(*values)

    return Invariant(name, says, find)
