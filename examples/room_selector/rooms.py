"""Rooms, requests, and which room is right: free, large enough, equipped, and the smallest of those."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

EQUIPMENT = ("projector", "whiteboard", "phone", "wheelchair access")


@dataclass(frozen=True)
class Room:
    """A room: its name, seats, equipment, and the hours at which it is booked."""

    name: str
    seats: int
    equipment: tuple[str, ...]
    booked: tuple[int, ...]

    def __str__(self) -> str:
        hours = ", ".join(f"{hour}:00" for hour in self.booked) or "never"
        equipment = ", ".join(self.equipment) or "nothing"
        return f"{self.name}: {self.seats} seats; equipment: {equipment}; booked at: {hours}"


def make_tasks(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests with the rooms of their day and the right answer; those without one are left out."""
    choice = random.Random(seed)
    tasks: list[dict[str, Any]] = []
    while len(tasks) < count:
        rooms = [_room(name, choice) for name in "ABCDEFGH"]
        people, hour = choice.randint(2, 14), choice.randint(9, 16)
        needs = choice.sample(EQUIPMENT, choice.randint(0, 2))
        answer = right_room(rooms, people, needs, hour)
        if answer is not None:
            tasks.append(
                {
                    "request": f"{people} people at {hour}:00, needs: {', '.join(needs) or 'nothing'}",
                    "rooms": "\n".join(map(str, rooms)),
                    "answer": answer,
                }
            )
    return tasks


def _room(name: str, choice: random.Random) -> Room:
    return Room(
        name,
        choice.choice((4, 6, 8, 10, 12, 16)),
        tuple(choice.sample(EQUIPMENT, choice.randint(1, 4))),
        tuple(sorted(choice.sample(range(9, 17), choice.randint(0, 5)))),
    )


def right_room(rooms: list[Room], people: int, needs: list[str], hour: int) -> str | None:
    """The smallest room that serves, the first of equal ones; None when none does."""
    fit = [
        room
        for room in rooms
        if room.seats >= people and set(needs) <= set(room.equipment) and hour not in room.booked
    ]
    return min(fit, key=lambda room: room.seats).name if fit else None


TRAIN = make_tasks(24, seed=1)
VAL = make_tasks(24, seed=2)
