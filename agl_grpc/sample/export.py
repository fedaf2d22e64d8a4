"""Samples as files that other tools read: one JSON object a line, Parquet (needs `pyarrow`), or tensors.

All hold the same columns and come back bit for bit: `read_samples(path)`. A tensor file (`.safetensors`, or
`.pt` for torch) holds the packed columns of `wire.pack`: one tensor a column, all rows one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from agl_grpc.sample.types import RowStart, Sample, Turn

FORMATS = ("jsonl", "parquet", "safetensors", "pt")
_ROWS_AT_ONCE = 1024
_ARRAYS = {
    "prompt_ids": np.int32,
    "response_ids": np.int32,
    "response_mask": np.int8,
    "logprobs": np.float32,
    "policy_versions": np.int64,
}


def write_samples(path: Path, samples: Iterable[Sample], form: str) -> int:
    """Writes samples to a file; returns how many. ValueError for a format that is none of `FORMATS`."""
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is none of {', '.join(FORMATS)}")
    if form in ("safetensors", "pt"):
        from agl_grpc.sample.tensors import write_tensors

        return write_tensors(path, samples, form)
    rows = map(_to_row, samples)
    return _write_parquet(path, rows) if form == "parquet" else _write_jsonl(path, rows)


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file that `write_samples` made; its name says the format."""
    if path.suffix in (".safetensors", ".pt"):
        from agl_grpc.sample.tensors import read_tensors

        yield from read_tensors(path)
        return
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from map(_from_row, batch.to_pylist())
        return
    with path.open("rb") as lines:
        for line in lines:
            yield _from_row(orjson.loads(line))


def _to_row(sample: Sample) -> dict[str, Any]:
    return {
        "rollout_id": sample.rollout_id,
        "attempt_id": sample.attempt_id,
        "group_id": sample.group_id,
        "reward": sample.reward,
        "temperature": sample.temperature,
        "start": sample.start.value,
        **{name: np.ascontiguousarray(getattr(sample, name), kind) for name, kind in _ARRAYS.items()},
        "turns": [{**asdict(turn), "span_id": turn.span_id.hex()} for turn in sample.turns],
        "rewards": [{"name": name, "value": value} for name, value in sorted(sample.rewards.items())],
    }


def _from_row(row: dict[str, Any]) -> Sample:
    arrays = {name: np.array(row[name], kind) for name, kind in _ARRAYS.items()}
    turns = [Turn(**{**turn, "span_id": bytes.fromhex(turn["span_id"])}) for turn in row["turns"]]
    return Sample(
        rollout_id=row["rollout_id"],
        attempt_id=row["attempt_id"],
        group_id=row["group_id"],
        reward=row["reward"],
        temperature=row["temperature"],
        turns=tuple(turns),
        start=RowStart(row["start"]),
        rewards={item["name"]: item["value"] for item in row["rewards"]},
        **arrays,
    )


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    turn = {"span_id": pa.string(), "choice": pa.int32(), "start": pa.int32(), "end": pa.int32()}
    turn |= {"reward": pa.float64(), "ret": pa.float64()}
    texts = ("rollout_id", "attempt_id", "group_id")
    numbers = ("reward", "temperature")
    schema = pa.schema(
        [
            *((name, pa.string()) for name in texts),
            *((name, pa.float64()) for name in numbers),
            ("start", pa.string()),
            *((name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in _ARRAYS.items()),
            ("turns", pa.list_(pa.struct(list(turn.items())))),
            ("rewards", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        ]
    )
    count, rows = 0, iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count
