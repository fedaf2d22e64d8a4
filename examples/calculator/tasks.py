"""Arithmetic questions from reasoning-gym's chain_sum: for training, and held out for validation."""

from __future__ import annotations

from typing import TypedDict

import reasoning_gym

VALIDATION_SEED = 20_000_000


class Task(TypedDict):
    """One question and its right answer."""

    question: str
    answer: str


def validation_tasks(size: int = 200) -> list[Task]:
    """Held-out questions, all different; the same ones for every training seed."""
    found = {task["question"]: task for task in _generate(VALIDATION_SEED, 2 * size)}
    return list(found.values())[:size]


def training_tasks(size: int, seed: int, held_out: frozenset[str]) -> list[Task]:
    """`size` questions, none of which is held out."""
    # Only short questions ever meet a held-out one: a tenth more is plenty.
    tasks = [t for t in _generate(seed, size + size // 10 + 100) if t["question"] not in held_out]
    return tasks[:size]


def _generate(seed: int, size: int) -> list[Task]:
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=size, min_terms=2, max_terms=4, min_digits=1, max_digits=2
    )
    return [Task(question=item["question"], answer=item["answer"]) for item in dataset]
