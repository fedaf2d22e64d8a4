"""How an evaluation fails: one line that says what is wrong and what to do."""

from __future__ import annotations


class EvaluationError(Exception):
    """An evaluation cannot be made, read or compared; the message is for people."""
