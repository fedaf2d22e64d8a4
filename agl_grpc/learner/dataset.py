"""verl dataset of tasks: one JSON object a line, as ``Trainer.fit`` writes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from torch.utils.data import Dataset

from agl_grpc.learner.errors import ConfigError


class TaskDataset(Dataset[dict[str, Any]]):  # type: ignore[misc]  # torch is not in the checking environment
    """Tasks from JSONL files. Every line is any JSON value: it is handed to the agent as it is.

    An item has ``raw_prompt`` (the task), ``index`` (its place in the file, from 0), ``data_source`` (the
    task's own key of that name, else ``default``) and ``task``.
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
        tasks = itertools.chain.from_iterable(map(self._read, paths))
        self._tasks = list(itertools.islice(tasks, max_samples) if max_samples > 0 else tasks)
        if not self._tasks:
            raise ConfigError(f"no tasks in {', '.join(paths)}: write one JSON value a line")

    @staticmethod
    def _read(path: str) -> list[Any]:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"task file {path} does not exist")
        tasks = []
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    tasks.append(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
        return tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        task = self._tasks[index]
        source = task.get("data_source", "default") if isinstance(task, dict) else "default"
        # The task travels through verl as its JSON text: verl stacks and copies values of other types.
        text = orjson.dumps(task).decode()
        return {"raw_prompt": text, "index": index, "data_source": source, "task": text}
