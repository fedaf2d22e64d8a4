"""Graders of the tests, at the top of a module as those that run in processes must be."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from agl_grpc.grader import Grade, grader


@grader(retries=0)
def exact(task: dict[str, Any], response: str) -> float:
    """1 for the task's answer."""
    return float(task["answer"] == response)


@grader(name="exact", version="2", retries=0)
def generous(task: dict[str, Any]) -> float:
    """A later version, which finds everything right."""
    return 1.0


@grader(retries=0)
async def parts(response: str) -> Grade:
    """With a component and a note."""
    return Grade(value=0.5, components={"length": float(len(response))}, notes={"why": "short"})


@grader(retries=1)
def raises(response: str) -> float:
    """Never has a verdict."""
    raise RuntimeError("no judgement today")


@grader(retries=0, timeout=0.5)
def hangs(response: str) -> float:
    """Never comes back."""
    while True:
        time.sleep(1)


@grader(retries=0)
def dies(response: str) -> float:
    """Takes its process along."""
    os._exit(7)


@grader(retries=3)
def text(response: str) -> Any:
    """No grade."""
    return "very good"


@grader(retries=3)
def nan(response: str) -> float:
    """No finite grade."""
    return math.nan


@grader(retries=0)
def slow(task: dict[str, Any], response: str) -> float:
    """As `exact`, and takes its time."""
    time.sleep(0.05)
    return float(task["answer"] == response)
