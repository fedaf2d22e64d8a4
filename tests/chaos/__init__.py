"""Proofs under fire: faults, histories of what clients saw, and a checker. `python -m tests.chaos --help`."""

from __future__ import annotations

# Before gRPC: it turns gRPC's fork handlers off, which now and then crash a program that is being started.
import agl_grpc  # noqa: F401  # imported for its effect
