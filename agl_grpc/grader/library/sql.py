"""The grader of SQL queries: they are carried out, and their results compared."""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade
from agl_grpc.grader.library.answers import bad_reference, find_answer, look_up, right, shown, wrong
from agl_grpc.grader.submission import Submission

_STEPS = 10_000
_ROWS = 100_000
_LONGEST = 100_000_000
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_NO_CODE = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
_ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)

Row = tuple[Any, ...]


class SqlMatch(Grader):
    """The response's query has the same result as the reference's, over the task's SQLite database.

    The query is the response's last fenced block, else the whole response. It can only read: whatever writes,
    attaches files or sets pragmas is refused as a wrong answer, as is one that runs too long or has too many
    rows. Rows count in any order, unless the reference ends with an ORDER BY. Columns count by place, not by
    name; 1 and 1.0 are equal.

    Args:
        reference: Where the task holds the right query.
        database: Where the task holds the path of an SQLite file, or the script (CREATE TABLE …) of one.
        folder: What relative paths start from.
        seconds: How long one query may run.
    """

    def __init__(
        self,
        *,
        name: str = "sql_match",
        reference: str = "query",
        database: str = "database",
        folder: str = ".",
        seconds: float = 5.0,
        version: str = "1",
        timeout: float = 30.0,
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=0, isolated=True)
        if not seconds > 0:
            raise ValueError(f"seconds is {seconds}; it must be positive")
        self.reference = reference
        self.database = database
        self.folder = folder
        self.seconds = seconds

    def grade(self, submission: Submission) -> Grade:
        """1.0 for the same result; else 0.0 with the reason."""
        wanted_query = str(look_up(submission.input, self.reference))
        place = look_up(submission.input, self.database)
        query = find_answer(submission.response, "fence") or submission.response.strip()
        if not query:
            return wrong("the response holds no query")
        with closing(self._open(str(place))) as connection:
            try:
                wanted = self._run(connection, wanted_query)
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                raise bad_reference(f"query fails: {error}: {shown(wanted_query)}") from None
            try:
                given = self._run(connection, query)
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                return wrong(f"the query fails: {error}", query=shown(query))
        return _compared(given, wanted, in_order=is_ordered(wanted_query), query=query)

    def _open(self, place: str) -> sqlite3.Connection:
        if re.match(r"\s*(create|begin|pragma|--|/\*)", place, re.IGNORECASE):
            connection = sqlite3.connect(":memory:")
            try:
                connection.executescript(place)
                connection.commit()
            except sqlite3.Error as error:
                connection.close()
                raise bad_reference(f"script of the database fails: {error}") from None
        else:
            path = Path(self.folder, place)
            if not path.is_file():
                raise bad_reference(f"database {place!r:.200} is not there")
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        connection.set_authorizer(_authorize)
        return connection

    def _run(self, connection: sqlite3.Connection, query: str) -> list[Row]:
        end = time.monotonic() + self.seconds
        connection.set_progress_handler(lambda: int(time.monotonic() > end), _STEPS)
        cursor = connection.execute(query)
        rows = cursor.fetchmany(_ROWS + 1)
        if len(rows) > _ROWS:
            raise ValueError(f"it has more than {_ROWS:,} rows")
        return rows


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _NO_CODE:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def is_ordered(query: str) -> bool:
    """Whether a query says in which order its rows come: an ORDER BY outside parentheses and quotes."""
    plain = re.sub(
        r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", " ", query, flags=re.DOTALL
    )
    while (inner := re.sub(r"\([^()]*\)", " ", plain)) != plain:
        plain = inner
    return _ORDERED.search(plain) is not None


def _compared(given: list[Row], wanted: list[Row], *, in_order: bool, query: str) -> Grade:
    notes: Mapping[str, Any] = {"query": shown(query), "rows": len(given), "expected_rows": len(wanted)}
    if given and wanted and len(given[0]) != len(wanted[0]):
        return wrong(f"it has {len(given[0])} columns instead of {len(wanted[0])}", **notes)
    if given == wanted or (not in_order and Counter(given) == Counter(wanted)):
        return right(**notes)
    if in_order and Counter(given) == Counter(wanted):
        return wrong("the rows are right and their order is not", **notes)
    return wrong("the result is another one", **notes)
