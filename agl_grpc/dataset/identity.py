"""What tells tasks and datasets apart: hashes of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from agl_grpc.dataset.errors import DatasetError

_CANONICAL = orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY


def task_key(task: Any, fields: Sequence[str] = ()) -> bytes:
    """Identity of a task by its content: 16 bytes, the same for the same task in any process.

    Texts count without their case and with every run of white space as one space; a mapping's key order does
    not count. ``fields`` names the keys that count, of tasks that are mappings; none = all.

    Raises:
        DatasetError: the task is not a JSON value, or lacks one of the fields.
    """
    if fields:
        if not isinstance(task, Mapping) or (missing := [name for name in fields if name not in task]):
            raise DatasetError(
                f"a task has no field {missing[0] if isinstance(task, Mapping) else fields[0]!r}"
            )
        task = {name: task[name] for name in fields}
    try:
        data = orjson.dumps(_normalised(task), option=_CANONICAL)
    except TypeError as error:
        raise DatasetError(f"a task is not a JSON value: {error}") from error
    return hashlib.blake2b(data, digest_size=16).digest()


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {key: _normalised(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return value


def tasks_in_order(tasks: Any, name: str = "the dataset") -> Iterator[Any]:
    """All tasks of anything with ``__len__`` and ``__getitem__``, one at a time.

    Raises:
        DatasetError: the dataset, which is the user's code, raised; says at which task.
    """
    total = len(tasks)
    for number in range(total):
        try:
            yield tasks[number]
        except DatasetError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise DatasetError(f"task {number} of {total} cannot be read from {name}: {reason}") from error


def dataset_digest(tasks: Any, name: str = "the dataset") -> dict[str, Any] | None:
    """Number of tasks and SHA-256 over their JSON, a task a line with sorted keys; streamed.

    Raises:
        DatasetError: a task cannot be read, or is not a JSON value.
    """
    if tasks is None:
        return None
    digest = hashlib.sha256()
    for number, task in enumerate(tasks_in_order(tasks, name)):
        try:
            digest.update(orjson.dumps(task, option=_CANONICAL | orjson.OPT_APPEND_NEWLINE))
        except TypeError as error:
            raise DatasetError(
                f"task {number} is not a JSON value, so it cannot reach an agent: {error}"
            ) from error
    return {"tasks": len(tasks), "sha256": digest.hexdigest()}
