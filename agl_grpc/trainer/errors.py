"""How training fails: one line that says what is wrong and what to do."""

from __future__ import annotations


class TrainerError(Exception):
    """Training cannot start or go on; the message is for people."""


class PartDied(TrainerError):
    """A process of the training run did not start or ended too early; the message shows its last lines."""
