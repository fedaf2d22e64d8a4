"""Fixtures of the proofs under fire."""

from __future__ import annotations

from tests.store.conftest import rig

__all__ = ["rig"]
