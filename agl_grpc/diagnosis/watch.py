"""Follows a run's metrics and says each alarm once: when it is raised, and when it is over."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from agl_grpc.diagnosis.limits import AlarmLimits
from agl_grpc.diagnosis.rules import AT_ONCE, RULES, Finding

ALARMS_FILE = "alarms.jsonl"
METRIC = "alarm/"


@dataclass(frozen=True)
class AlarmEvent:
    """An alarm that began at a step (``raised``) or was over at it, with what was seen and what to do."""

    step: int
    name: str
    raised: bool
    seen: str
    advice: str

    @property
    def line(self) -> str:
        """For people."""
        if self.raised:
            return f"ALARM {self.name} at step {self.step}: {self.seen}. What to do: {self.advice}."
        return f"alarm {self.name} is over at step {self.step}: {self.seen}"


class AlarmWatch:
    """Judges each step; an alarm goes up after some steps in a row that show it, and down as slowly.

    Args:
        limits: from when on.
    """

    def __init__(self, limits: AlarmLimits | None = None) -> None:
        self.limits = limits or AlarmLimits()
        self._history: list[dict[str, float]] = []
        # Steps in a row that speak against an alarm's present state.
        self._against = dict.fromkeys(RULES, 0)
        self._raised_at: dict[str, int] = {}

    @property
    def raised(self) -> list[str]:
        """Alarms that are up."""
        return list(self._raised_at)

    @property
    def stops(self) -> str:
        """The first alarm that is up and shall end the run; empty = none."""
        return next((name for name in self.limits.stop_on if name in self._raised_at), "")

    def step(self, step: int, metrics: Mapping[str, float]) -> list[AlarmEvent]:
        """What began or ended with this step. Numbers that are not finite are left out."""
        self._history.append({name: value for name, value in metrics.items() if math.isfinite(value)})
        events = []
        for name, rule in RULES.items():
            event = self._judge(step, name, rule(self._history, self.limits))
            if event is not None:
                events.append(event)
        return events

    def numbers(self) -> dict[str, float]:
        """``alarm/NAME`` of every alarm: 1 = up."""
        return {f"{METRIC}{name}": float(name in self._raised_at) for name in RULES}

    def _judge(self, step: int, name: str, found: Finding | None) -> AlarmEvent | None:
        up = name in self._raised_at
        if (found is not None) is up:
            self._against[name] = 0
            return None
        self._against[name] += 1
        needed = self.limits.clear_after if up else 1 if name in AT_ONCE else self.limits.raise_after
        if self._against[name] < needed:
            return None
        self._against[name] = 0
        if found is not None:
            self._raised_at[name] = step
            return AlarmEvent(step, name, True, found.seen, found.advice)
        began = self._raised_at.pop(name)
        seen = f"not seen in the last {needed} steps; it had been raised at step {began}"
        return AlarmEvent(step, name, False, seen, "")


class AlarmFile:
    """``alarms.jsonl`` of a run folder: a line for each event."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ALARMS_FILE

    def write(self, event: AlarmEvent) -> None:
        """Appends a line."""
        with self._path.open("ab") as file:
            file.write(orjson.dumps({"time": time.time(), **asdict(event)}, option=orjson.OPT_APPEND_NEWLINE))
