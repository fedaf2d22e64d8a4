"""Tasks: read from files of any size, chosen, mixed, told apart, and ordered by how often they are solved."""

from __future__ import annotations

from agl_grpc.dataset.curriculum import Curriculum, CurriculumRules
from agl_grpc.dataset.errors import DatasetError
from agl_grpc.dataset.identity import dataset_digest, task_key, tasks_in_order
from agl_grpc.dataset.jsonl import JsonlTasks
from agl_grpc.dataset.parquet import ParquetTasks
from agl_grpc.dataset.reading import open_dataset
from agl_grpc.dataset.selection import expression, mix, select

__all__ = [
    "Curriculum",
    "CurriculumRules",
    "DatasetError",
    "JsonlTasks",
    "ParquetTasks",
    "dataset_digest",
    "expression",
    "mix",
    "open_dataset",
    "select",
    "task_key",
    "tasks_in_order",
]
