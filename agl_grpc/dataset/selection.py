"""Which tasks of a dataset count, and several datasets as one: views, which copy no task."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, overload

from agl_grpc.dataset.errors import DatasetError
from agl_grpc.dataset.identity import task_key, tasks_in_order

_NAMES: Mapping[str, Any] = {
    "__builtins__": {},
    **{
        function.__name__: function
        for function in (abs, all, any, bool, float, int, isinstance, len, max, min, round, sorted, str, sum)
    },
}


class View(Sequence[Any]):
    """Tasks of other datasets: of each place, the part and the task's place in it. ``sources`` name the parts
    of tasks that are mappings and say nothing of their ``data_source`` themselves.
    """

    def __init__(self, parts: Sequence[Any], places: Sequence[array[int]], sources: Sequence[str]) -> None:
        self._parts, (self._of, self._at), self._sources = parts, places, sources

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        part = self._of[index] if self._of else 0
        task = self._parts[part][self._at[index]]
        source = self._sources[part]
        if source and isinstance(task, Mapping) and "data_source" not in task:
            return {**task, "data_source": source}
        return task


def expression(text: str) -> Callable[[Any], Any]:
    """A Python expression over one task: ``task`` is the task, and its fields are names.

    For example ``level > 2 and len(question) < 500``. Of Python's functions there are `len`, `min`, `sum` and
    a few others.

    Raises:
        DatasetError: it is not an expression; or, when it is called, it raises for a task.
    """
    try:
        code: CodeType = compile(text, "<expression>", "eval")
    except SyntaxError as error:
        raise DatasetError(f"{text!r} is not an expression: {error.msg}") from error

    def evaluate(task: Any) -> Any:
        names = {**task, "task": task} if isinstance(task, Mapping) else {"task": task}
        try:
            return eval(code, dict(_NAMES), names)
        except NameError as error:
            known = ", ".join(map(str, names))
            raise DatasetError(f"{text!r}: {error}; a task has {known}") from error
        except Exception as error:
            raise DatasetError(f"{text!r}: {type(error).__name__}: {error}") from error

    return evaluate


def select(
    tasks: Any,
    *,
    keep: str | Callable[[Any], bool] | None = None,
    require: Sequence[str] = (),
    deduplicate: bool | Sequence[str] = False,
    limit: int = 0,
    source: str = "",
    name: str = "the dataset",
) -> View:
    """The tasks that count, in their order.

    Args:
        tasks: anything with ``__len__`` and ``__getitem__``; read once, one task at a time.
        keep: an expression (see `expression`) or a function; tasks for which it is false are left out.
        require: fields that every task must have, not None.
        deduplicate: leaves out what was there before by normalised content (see `task_key`), of all fields or
            of those named.
        limit: how many to keep; 0 = all.
        source: the ``data_source`` of tasks that name none.
        name: of the dataset, for messages.

    Raises:
        DatasetError: a task lacks a field, cannot be read or judged; or none is left.
    """
    wanted = expression(keep) if isinstance(keep, str) else keep
    fields = () if isinstance(deduplicate, bool) else deduplicate
    seen: set[bytes] = set()
    chosen = array("q")
    for number, task in enumerate(tasks_in_order(tasks, name)):
        try:
            _require(task, require)
            if wanted is not None and not wanted(task):
                continue
            key = task_key(task, fields) if deduplicate else b""
        except Exception as error:  # also what the user's function raises
            reason = str(error) if isinstance(error, DatasetError) else f"{type(error).__name__}: {error}"
            raise DatasetError(f"task {number} of {name}: {reason}") from error
        if deduplicate and key in seen:
            continue
        seen.add(key)
        chosen.append(number)
        if limit and len(chosen) == limit:
            break
    if not chosen:
        raise DatasetError(f"no task of {name} is left: {len(tasks)} were looked at")
    return View([tasks], (array("q"), chosen), [source])


def _require(task: Any, fields: Sequence[str]) -> None:
    for field in fields:
        if not isinstance(task, Mapping) or task.get(field) is None:
            has = ", ".join(map(str, task)) if isinstance(task, Mapping) else type(task).__name__
            raise DatasetError(f"the field {field!r} is missing; it has {has}")


def mix(parts: Sequence[tuple[str, Any, float]], *, size: int = 0, seed: int = 0) -> View:
    """Several datasets as one, in a seeded order, each with a share of the tasks that its weight says.

    Args:
        parts: name (the ``data_source`` of its tasks), dataset and weight of each.
        size: number of tasks; 0 = as many as use every dataset at most once.
        seed: of the choice and the order. A dataset that has to give more tasks than it has gives all of them
            again, in a new order.

    Raises:
        DatasetError: a weight is not positive, or there is no part.
    """
    if not parts:
        raise DatasetError("a mixture needs datasets: name at least one")
    for name, tasks, weight in parts:
        if not weight > 0:
            raise DatasetError(f"the weight of {name!r} is {weight}; it must be above 0")
        if not len(tasks):
            raise DatasetError(f"no tasks in {name!r}")
    total = sum(weight for _, _, weight in parts)
    size = size or int(min(len(tasks) * total / weight for _, tasks, weight in parts)) or len(parts)
    shares = _shares([weight / total for _, _, weight in parts], size)
    of, at = array("q"), array("q")
    for number, ((name, tasks, _), share) in enumerate(zip(parts, shares, strict=True)):
        chosen = itertools.islice(_again_and_again(len(tasks), f"{seed}/{name}"), share)
        at.extend(chosen)
        of.extend(itertools.repeat(number, share))
    order = list(range(size))
    random.Random(f"{seed}/mix").shuffle(order)
    places = (array("q", (of[i] for i in order)), array("q", (at[i] for i in order)))
    return View([tasks for _, tasks, _ in parts], places, [name for name, _, _ in parts])


def _shares(fractions: Sequence[float], size: int) -> list[int]:
    """Whole numbers that add up to ``size``, by the largest remainders."""
    shares = [int(fraction * size) for fraction in fractions]
    by_rest = sorted(range(len(shares)), key=lambda i: (shares[i] - fractions[i] * size, i))
    for number in by_rest[: size - sum(shares)]:
        shares[number] += 1
    return shares


def _again_and_again(length: int, seed: str) -> Any:
    for turn in itertools.count():
        order = list(range(length))
        random.Random(f"{seed}/{turn}").shuffle(order)
        yield from order
