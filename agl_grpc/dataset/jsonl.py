"""Tasks in a JSONL file, found by their places in it: a million of them need 8 MB."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import orjson

from agl_grpc.dataset.errors import DatasetError


class JsonlTasks(Sequence[Any]):
    """One JSON value a line; empty lines are passed over. A ``.gz`` file is unpacked once, beside ``TMPDIR``.

    Only the lines' places are kept in memory; a task is read and parsed when it is asked for. May be read by
    several threads, and after a fork.

    Raises:
        DatasetError: the file cannot be read or holds no task; later, by file and line, that a line is not
            JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._places = array("Q")
        # The line in the file of the tasks at which the two begin to differ by more: empty lines are rare.
        self._skips: list[tuple[int, int]] = []
        try:
            self._file = _unpacked(self.path) if self.path.suffix == ".gz" else self.path.open("rb")
            # The file lives as long as the dataset.
            weakref.finalize(self, self._file.close)
            self._index()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DatasetError(f"{path} is not a whole gzip file: {error}") from error
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
        if not len(self):
            raise DatasetError(f"no tasks in {path}: write one JSON value a line")

    def _index(self) -> None:
        place = skipped = 0
        for line in self._file:
            if line.isspace():
                skipped += 1
                self._skips.append((len(self._places), skipped))
            else:
                self._places.append(place)
            place += len(line)
        self._end = place

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"task {index} of {len(self)} in {self.path}")
        start = self._places[at]
        end = self._places[at + 1] if at + 1 < len(self) else self._end
        return self._parse(os.pread(self._file.fileno(), end - start, start), at)

    def __iter__(self) -> Iterator[Any]:
        for at in range(len(self)):
            yield self[at]

    def _parse(self, line: bytes, at: int) -> Any:
        try:
            # The end of the range may hold empty lines that follow.
            return orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DatasetError(f"{self.path}, line {self.line(at)}: not JSON ({error})") from error

    def line(self, index: int) -> int:
        """The line of the file, from 1, on which a task stands."""
        return index + 1 + max((skipped for first, skipped in self._skips if first <= index), default=0)


def _unpacked(path: Path) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="agl-tasks-")  # noqa: SIM115  # closed with the dataset
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except BaseException:
        file.close()
        raise
    file.flush()
    file.seek(0)
    return file
