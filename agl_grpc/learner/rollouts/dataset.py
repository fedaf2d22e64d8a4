"""verl dataset of tasks: one JSON object a line, as ``Trainer.fit`` writes them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from torch.utils.data import Dataset

from agl_grpc.dataset import DatasetError, JsonlTasks, expression
from agl_grpc.learner.errors import ConfigError

# verl's name for the size of a prompt's group.
ROLLOUTS_KEY = "__rollout_n__"
MOST_ROLLOUTS = 1024


class TaskDataset(Dataset[dict[str, Any]]):  # type: ignore[misc]  # torch is not in the checking environment
    """Tasks from JSONL files, read when they are asked for. Every line is any JSON value: it is handed to the
    agent as it is.

    An item has ``raw_prompt`` (the task), ``index`` (its place in the file, from 0), ``data_source`` (the
    task's own key of that name, else ``default``) and ``task``; with ``agl_rollouts_per_task`` in ``config``,
    an expression over the task, ``__rollout_n__`` too.
    """

    def __init__(
        self,
        data_files: str | Sequence[str],
        tokenizer: Any = None,
        processor: Any = None,
        config: Any = None,
        max_samples: int = -1,
    ) -> None:
        paths = [data_files] if isinstance(data_files, str) else list(data_files)
        try:
            self._files = [JsonlTasks(path) for path in paths]
            rule = config.get("agl_rollouts_per_task", "") if config is not None else ""
            self._rollouts = expression(rule) if rule else None
        except DatasetError as error:
            raise ConfigError(str(error)) from error
        self._starts = list(itertools.accumulate(map(len, self._files), initial=0))
        self._length = min(self._starts[-1], max_samples) if max_samples > 0 else self._starts[-1]

    def __len__(self) -> int:
        return self._length

    def task(self, index: int) -> Any:
        """The task at a place."""
        place = bisect.bisect_right(self._starts, index) - 1
        try:
            return self._files[place][index - self._starts[place]]
        except DatasetError as error:
            raise ConfigError(str(error)) from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        task = self.task(index)
        source = task.get("data_source", "default") if isinstance(task, dict) else "default"
        # The task travels through verl as its JSON text: verl stacks and copies values of other types.
        text = orjson.dumps(task).decode()
        item = {"raw_prompt": text, "index": index, "data_source": source, "task": text}
        if self._rollouts is not None:
            item[ROLLOUTS_KEY] = self._group_size(self._rollouts, index, task)
        return item

    @staticmethod
    def _group_size(rule: Callable[[Any], Any], index: int, task: Any) -> int:
        try:
            size = rule(task)
        except DatasetError as error:
            raise ConfigError(f"rollouts_per_task: task {index}: {error}") from error
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_ROLLOUTS:
            raise ConfigError(
                f"rollouts_per_task: task {index} has {size!r} rollouts; it must be a whole number from 1 to "
                f"{MOST_ROLLOUTS}"
            )
        return size
