"""Training runs, batches and policy versions."""

from __future__ import annotations
