"""What ends an algorithm."""

from __future__ import annotations


class AlgorithmError(RuntimeError):
    """An algorithm cannot go on; the message says why and what to do, in one line."""
