"""What all of these agents do: find out the weather with a tool, and say it."""

from __future__ import annotations

from typing import TypedDict

INSTRUCTIONS = "You answer questions about the weather. Look it up with your tool."

WEATHER = {"Paris": "sunny", "London": "rainy", "Oslo": "snowy"}


class Task(TypedDict):
    """A question, and the word that a right answer contains."""

    question: str
    answer: str


def get_weather(city: str) -> str:
    """Look up the weather of a city.

    Args:
        city: the city's name, for example Oslo
    """
    return f"It is {WEATHER.get(city, 'unknown')} in {city} now."


def score(task: Task, said: str | None) -> float:
    """The reward: 1.0 for a right answer, else 0.0."""
    return float(task["answer"] in (said or ""))
