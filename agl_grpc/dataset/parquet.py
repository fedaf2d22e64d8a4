"""Tasks in Parquet files: rewritten once as Arrow batches on disk, which are mapped into memory."""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from agl_grpc.dataset.errors import DatasetError

_BATCH_ROWS = 4096


class ParquetTasks(Sequence[Any]):
    """A row is a task: a mapping of the columns' names to values. Needs the package ``pyarrow``.

    Row groups of Parquet can only be read as wholes, and are often as large as the file; so the file is
    streamed once into a temporary Arrow file, of which the kernel keeps in memory what is used.

    Raises:
        DatasetError: pyarrow is missing, the file is none of Parquet, or has no rows.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise DatasetError(f"{path} needs the package pyarrow: pip install 'agl-grpc[data]'") from error
        self.path = Path(path).expanduser()
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                self._batches = _mapped(file, columns)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
            raise DatasetError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        if not len(self):
            raise DatasetError(f"no tasks in {path}: it has no rows")

    def __len__(self) -> int:
        return self._starts[-1]

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
        place = bisect.bisect_right(self._starts, at) - 1
        return self._batches[place].slice(at - self._starts[place], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield from batch.to_pylist()


def _mapped(file: Any, columns: Sequence[str] | None) -> list[Any]:
    import pyarrow

    with tempfile.NamedTemporaryFile(prefix="agl-tasks-", suffix=".arrow") as place:
        wanted = file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        first = next(wanted, None)
        if first is None:
            return []
        with pyarrow.ipc.new_file(place.name, first.schema) as writer:
            writer.write_batch(first)
            for batch in wanted:
                writer.write_batch(batch)
        # The mapping outlives the name: nothing is left behind, however the process ends.
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(place.name))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
