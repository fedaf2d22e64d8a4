"""Proofs under fire: faults, histories of what clients saw, and a checker. `python -m tests.chaos --help`."""

from __future__ import annotations
