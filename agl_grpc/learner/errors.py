"""Errors of the learner that a person is meant to read."""

from __future__ import annotations


class LearnerError(Exception):
    """Base of the learner's own errors; the message is one line and says what to do."""


class ConfigError(LearnerError):
    """The configuration cannot be used as it is."""


class FidelityError(LearnerError):
    """What reached the optimiser is not what was sampled and judged: training stops before the update."""


class DeadlineError(LearnerError):
    """A phase took longer than its deadline; the message names what it waited for."""


class WorkerError(LearnerError):
    """A worker of verl failed or died; the message says in which phase."""


class MemoryExhaustedError(WorkerError):
    """A worker of verl had too little memory for a phase; the worker itself lives."""


class StoppedError(LearnerError):
    """The training run was asked to stop."""
