"""Faults on purpose at named places of the writer, to prove what a crash there leaves behind.

Off unless the environment variable AGL_GRPC_FAILPOINTS is set: rules of place, action and probability
(default 1), for example `before_commit:kill@0.01;after_commit:delay(20)@0.1;seed=7`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import dataclass

from agl_grpc.store.storage.engine import DatabaseError

VARIABLE = "AGL_GRPC_FAILPOINTS"
PLACES = ("before_commit", "after_commit")
"""When a group of commands is written but not committed; when it is committed but nobody was answered."""

_RULE = re.compile(r"(?P<place>\w+):(?P<action>kill|stop|delay\((?P<ms>\d+)\))(?:@(?P<chance>[\d.]+))?")


@dataclass(frozen=True)
class Rule:
    """What may happen at a place.

    Attributes:
        place: One of PLACES.
        action: `kill`, `stop` or `delay`.
        seconds: How long a delay takes.
        chance: Probability at each visit.
    """

    place: str
    action: str
    seconds: float
    chance: float


class Failpoints:
    """The rules that are in force."""

    def __init__(self, rules: list[Rule], seed: int | None) -> None:
        self._rules = rules
        self._random = random.Random(seed)

    def hit(self, place: str) -> None:
        """Does what the rules want at this place: nothing, a delay, or the end of the process."""
        for rule in self._rules:
            if rule.place == place and self._random.random() < rule.chance:
                if rule.action == "delay":
                    time.sleep(rule.seconds)
                else:
                    os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)


def from_environment() -> Failpoints | None:
    """The rules of AGL_GRPC_FAILPOINTS; None when it is not set.

    Raises:
        DatabaseError: A rule cannot be read; the message says which.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    rules, seed = [], None
    for part in filter(None, text.split(";")):
        found = _RULE.fullmatch(part)
        if part.startswith("seed=") and part[5:].isdigit():
            seed = int(part[5:])
        elif found is None or found["place"] not in PLACES:
            raise DatabaseError(
                f"{VARIABLE}: cannot read {part!r}; write PLACE:ACTION@PROBABILITY with a place of "
                f"{', '.join(PLACES)} and an action of kill, stop, delay(MILLISECONDS)"
            )
        else:
            action = found["action"].partition("(")[0]
            rules.append(
                Rule(found["place"], action, int(found["ms"] or 0) / 1000, float(found["chance"] or 1))
            )
    return Failpoints(rules, seed)
