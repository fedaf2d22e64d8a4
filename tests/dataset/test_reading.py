"""Datasets of every kind and size; what is wrong with one is said in one line."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest

from agl_grpc.dataset import DatasetError, JsonlTasks, ParquetTasks, dataset_digest, open_dataset
from agl_grpc.trainer import TrainerError
from agl_grpc.trainer.files import read_dataset

TASKS = [{"n": number, "text": f"Frage {number}: ü"} for number in range(10)]
# Growth of the resident memory while a million rows are opened and some of them read; they need 130 MB.
_GROWTH_MB = 64
_MILLION = """
import sys, time
from agl_grpc.dataset import open_dataset
import pyarrow.parquet, orjson
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024
before, began = anonymous(), time.perf_counter()
tasks = open_dataset(sys.argv[1])
seen = [tasks[at]["n"] for at in (0, 999_999, 500_000, -1, 123_456)]
print(orjson.dumps({"n": len(tasks), "seen": seen, "mb": anonymous() - before,
                    "seconds": time.perf_counter() - began}).decode())
"""


def write_jsonl(path: Path, tasks: list[Any] = TASKS) -> Path:
    data = b"\n\n".join(map(orjson.dumps, tasks))
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, tasks: list[Any] = TASKS) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tasks), path)
    return path


def save_to_disk(path: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(TASKS).save_to_disk(str(path))
    return path


class Lazy:
    """An object that only has the two methods, and breaks at one task."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(TASKS)

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise RuntimeError("the disk is gone")
        return TASKS[index]


def test_every_kind_gives_the_same_tasks_and_the_same_digest(tmp_path: Path) -> None:
    specs: list[Any] = [
        TASKS,
        Lazy(),
        str(write_jsonl(tmp_path / "a.jsonl")),
        str(write_jsonl(tmp_path / "a.jsonl.gz")),
        str(write_parquet(tmp_path / "a.parquet")),
        str(save_to_disk(tmp_path / "saved")),
    ]
    opened = [read_dataset("train_dataset", spec) for spec in specs]
    for tasks in opened:
        assert [tasks[at] for at in range(len(tasks))] == TASKS
    assert len({orjson.dumps(dataset_digest(tasks)) for tasks in opened}) == 1
    assert dataset_digest(TASKS[::-1]) != dataset_digest(TASKS)


def test_slices_ends_and_empty_lines(tmp_path: Path) -> None:
    for tasks in (
        JsonlTasks(write_jsonl(tmp_path / "a.jsonl")),
        ParquetTasks(write_parquet(tmp_path / "a.parquet")),
    ):
        assert list(tasks) == TASKS
        assert tasks[-2:] == TASKS[-2:]
        assert tasks[-1] == TASKS[-1]
        with pytest.raises(IndexError, match="task 10 of 10"):
            tasks[10]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_million_rows_are_not_loaded(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    text = "x" * 100
    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(f'{{"n":{number},"text":"{text}"}}\n' for number in range(1_000_000))
    else:
        table = pyarrow.table({"n": range(1_000_000), "text": [text] * 1_000_000})
        pyarrow.parquet.write_table(table, path, row_group_size=1_000_000)
    done = subprocess.run(
        [sys.executable, "-c", _MILLION, str(path)], capture_output=True, text=True, check=True, timeout=200
    )
    found = orjson.loads(done.stdout)
    print(found)
    assert found["n"] == 1_000_000
    assert found["seen"] == [0, 999_999, 500_000, 999_999, 123_456]
    assert found["mb"] < _GROWTH_MB
    assert found["seconds"] < 20


def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n\n\n{"a": 2}\n{"a": \n{"a": 3}\n')
    tasks = read_dataset("train_dataset", str(path))
    assert tasks[3] == {"a": 3}
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 5: not JSON"):
        dataset_digest(tasks)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no tasks in .*write one JSON value a line"),
        ("a.jsonl.gz", b"not gzip", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], "is not a whole gzip file"),
        ("a.parquet", b"no parquet at all", "is not a Parquet file"),
        ("a.csv", b"a,b", "train_dataset '.*a.csv': no .jsonl"),
    ],
)
def test_files_that_are_none(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=words) as caught:
        open_dataset(str(tmp_path / name), name="train_dataset")
    assert "\n" not in str(caught.value)


def test_other_things_that_are_no_datasets(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"none\.jsonl cannot be read: No such file"):
        read_dataset("train_dataset", str(tmp_path / "none.jsonl"))
    with pytest.raises(DatasetError, match="is no dataset saved to disk"):
        open_dataset(str(tmp_path))
    with pytest.raises(DatasetError, match="the dataset is a int: give a path"):
        open_dataset(5)
    empty = pyarrow.table({"n": pyarrow.array([], type=pyarrow.int64())})
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DatasetError, match="it has no rows"):
        open_dataset(str(tmp_path / "empty.parquet"))


def test_a_dataset_that_raises_and_one_that_is_no_json_are_named_by_the_task() -> None:
    with pytest.raises(DatasetError, match=r"task 4 of 10 cannot be read from train: RuntimeError: the disk"):
        dataset_digest(Lazy(broken=4), "train")
    with pytest.raises(DatasetError, match="task 1 is not a JSON value"):
        dataset_digest([1, object()])


def test_splits_are_asked_for_by_name(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(TASKS)})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DatasetError, match=r"has splits: name one of .*both/train"):
        open_dataset(str(tmp_path / "both"))
    assert open_dataset(str(tmp_path / "both" / "train"))[3] == TASKS[3]
    with pytest.raises(DatasetError, match="has the splits train"):
        open_dataset(both)
